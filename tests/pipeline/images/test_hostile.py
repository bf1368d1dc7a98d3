"""Images and archives that are damaged, or made to harm: refused in one line, or listed with the reason."""

import hashlib
import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.pictures import pictures
from support.real_images import encode_config, image_files, png, write_folder, write_parquet, write_zip
from support.toy import samples

from configs.errors import RunStopped, UserError
from pipeline.images import source as source_module
from pipeline.images.encode import encode_images
from pipeline.images.source import listed, open_source
from pipeline.images.transforms import BadImage, to_image
from pipeline.shards.dataset import Dataset
from pipeline.shards.manifest import read_commits
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify

FILES = image_files()
GOOD = FILES["cat/000.png"]


def huge_png(width, height):
    """A PNG of a few hundred bytes that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(buffer, "JPEG")
    return buffer.getvalue()


BAD = {
    "cut.png": (GOOD[: len(GOOD) // 2], "is cut short or damaged"),
    "cut.jpg": (jpeg()[:-200], "is cut short or damaged"),
    "empty.png": (b"", "is no png, jpeg, webp or bmp"),
    "text.png": (b"<svg onload='evil()'/>", "is no png, jpeg, webp or bmp"),
    "huge.png": (huge_png(9000, 9000), "has more than 67,108,864 pixels"),
    "long.png": (huge_png((1 << 20) + 1, 1), "has a side of more than 1,048,576 pixels"),
    "larger.png": (huge_png(2**31 - 1, 2**31 - 1), "has more than 67,108,864 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_has_a_reason(name):
    data, reason = BAD[name]
    with pytest.raises(BadImage) as caught:
        to_image(data, 16, "center_crop")
    assert str(caught.value) == reason


def test_other_formats_are_not_even_parsed():
    buffer = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(buffer, "GIF")
    with pytest.raises(BadImage, match="is no png"):
        to_image(buffer.getvalue(), 16, "scale")


def test_bad_images_are_listed_and_the_others_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "MAX_IMAGE_BYTES", 4000)
    large = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    files = {**FILES, **{f"bad/{name}": data for name, (data, _) in BAD.items()}, "bad/large.png": large}
    config = encode_config(tmp_path / "root", {"kind": "folder", "path": str(write_folder(tmp_path / "in", files))})
    with pytest.raises(RunStopped, match=r"samples are bad \(.*mend the source"):
        encode_images(config)
    runtime = config.runtime.model_copy(update={"max_rejected_fraction": 0.5})
    encode_images(config.model_copy(update={"runtime": runtime}))
    dataset = Dataset.open_any(Storage.open(str(tmp_path / "root")))
    order = sorted(files, key=lambda name: name.split("/"))
    rejected = {order[int(one.key)]: one.reason for commit in read_commits(dataset) for one in commit.rejected}
    expected = {f"bad/{name}": reason for name, (_, reason) in BAD.items()}
    assert rejected == {**expected, "bad/large.png": source_module.TOO_LARGE}
    assert [row["name"] for _, row in samples(tmp_path / "root").values()] == list(FILES)
    assert verify(dataset).problems == []


@pytest.mark.parametrize(
    "name", ["../evil.png", "/etc/evil.png", "cat/../../evil.png", "cat\\..\\evil.png", "a\nb.png"]
)
@pytest.mark.parametrize("kind", ["zip", "webdataset"])
def test_a_name_that_leads_out_of_its_archive_is_refused(kind, name, tmp_path):
    path = tmp_path / ("a.zip" if kind == "zip" else "a.tar")
    if kind == "zip":
        write_zip(path, {name: GOOD})
    else:
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo(name)
            info.size = len(GOOD)
            tar.addfile(info, io.BytesIO(GOOD))
    with pytest.raises(UserError, match="leads out of the archive") as caught:
        encode_images(encode_config(tmp_path / "root", {"kind": kind, "path": str(path)}))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [path]


def encode_zip(path, root):
    encode_images(encode_config(root, {"kind": "zip", "path": str(path)}, runtime={"max_rejected_fraction": 0.5}))
    return [row["name"] for _, row in samples(root).values()]


def test_a_member_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "MAX_IMAGE_BYTES", 1 << 20)
    unpacked = []
    original = zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *given: unpacked.append(given[1]) or original(*given))
    files = {**FILES, "bomb.png": bytes(16 << 20)}
    assert encode_zip(write_zip(tmp_path / "a.zip", files), tmp_path / "root") == list(FILES)
    assert "bomb.png" not in unpacked


def test_a_member_that_lies_about_its_size_gives_no_more_than_it_says(tmp_path):
    path = write_zip(tmp_path / "a.zip", {**FILES, "bomb.png": bytes(1 << 20)})
    data = path.read_bytes()
    honest, lie = struct.pack("<I", 1 << 20), struct.pack("<I", 100)
    assert data.count(honest) == 2
    path.write_bytes(data.replace(honest, lie))
    assert encode_zip(path, tmp_path / "root") == list(FILES)  # cut at 100 bytes, whose checksum is wrong


def test_a_damaged_and_an_encrypted_member_are_listed(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    with zipfile.ZipFile(path) as archive:
        damaged, encrypted = archive.getinfo("cat/001.png"), archive.getinfo("cat/002.png")
    data = bytearray(path.read_bytes())
    data[damaged.header_offset + 30 + len(damaged.filename) + damaged.compress_size // 2] ^= 0xFF
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(encrypted.filename.encode()))
    data[entry + 8] |= 1
    path.write_bytes(data)
    assert encode_zip(path, tmp_path / "root") == [n for n in FILES if n not in ("cat/001.png", "cat/002.png")]


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", GOOD)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", GOOD)
    with pytest.raises(UserError, match=r"has a\.png twice"):
        encode_zip(tmp_path / "a.zip", tmp_path / "root")


@pytest.mark.parametrize("damage", ["header", "zeroed header", "cut", "cut between members"])
def test_a_tar_that_ends_too_early_is_refused(damage, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for at in range(4):
            info = tarfile.TarInfo(f"{at}.png")
            info.size = len(GOOD)
            tar.addfile(info, io.BytesIO(GOOD))
    with tarfile.open(path) as tar:
        start = tar.getmember("2.png").offset
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[start : start + 4] = b"\xff\xff\xff\xff"
    elif damage == "zeroed header":
        data[start : start + 512] = bytes(512)
    else:
        data = data[: start + (700 if damage == "cut" else 0)]
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        encode_images(encode_config(tmp_path / "root", {"kind": "webdataset", "path": str(path)}))


def test_an_empty_image_is_rejected_in_a_tar_as_in_a_folder(tmp_path):
    named = {"000.png": GOOD, "001.png": b"", "002.png": FILES["dog/010.png"]}
    write_folder(tmp_path / "folder", named)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in named:
            tar.add(tmp_path / "folder" / name, name)
    rejected = []
    for kind, path in (("folder", "folder"), ("webdataset", "a.tar")):
        root, source = tmp_path / f"{kind}-root", {"kind": kind, "path": str(tmp_path / path)}
        encode_images(encode_config(root, source, runtime={"max_rejected_fraction": 0.5}))
        (commit,) = read_commits(Dataset.open_any(Storage.open(str(root))))
        rejected.append([(one.key, one.reason) for one in commit.rejected])
        assert [row["source_sha256"] for _, row in samples(root).values()] == [
            hashlib.sha256(named[name]).hexdigest() for name in ("000.png", "002.png")
        ]
    assert rejected[0] == rejected[1] == [("000000001", "is no png, jpeg, webp or bmp")]


@pytest.mark.parametrize(
    ("kind", "said"),
    [(tarfile.LNKTYPE, "a link"), (tarfile.SYMTYPE, "a link"), (tarfile.FIFOTYPE, "a device or a pipe")],
)
@pytest.mark.parametrize("suffix", ["png", "cls", "txt"])
def test_a_member_without_bytes_of_its_own_is_refused(kind, said, suffix, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {"0.png": GOOD, "0.cls": b"1", "0.txt": b"a cat", "1.json": b"{}"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo(f"1.{suffix}")
        info.type, info.linkname = kind, f"0.{suffix}"
        tar.addfile(info)
    with pytest.raises(UserError) as caught:
        encode_images(encode_config(tmp_path / "root", {"kind": "webdataset", "path": str(path)}))
    assert str(caught.value) == (
        f"{path}: member 1.{suffix} is {said}, not a file; "
        "write the tar again with --dereference --hard-dereference, without --sparse"
    )
    assert sorted(tmp_path.iterdir()) == [path]


def test_an_image_stored_with_holes_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.png")
        info.size = len(GOOD)
        info.pax_headers = {"GNU.sparse.map": f"0,{len(GOOD)}", "GNU.sparse.size": "1048576"}
        tar.addfile(info, io.BytesIO(GOOD))
    with pytest.raises(UserError, match=r"a\.tar: member 0\.png is a sparse file, not a file; write the tar again"):
        encode_images(encode_config(tmp_path / "root", {"kind": "webdataset", "path": str(tmp_path / "a.tar")}))


@pytest.mark.parametrize("size", [-512, 1 << 64])
def test_a_member_of_an_impossible_size_is_refused(size, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("0.json")
        info.size = size  # -512: the next header would be this one again
        tar.addfile(info)
    with pytest.raises(UserError, match=f"damaged one .a member of {size:,} bytes"):
        encode_images(encode_config(tmp_path / "root", {"kind": "webdataset", "path": str(path)}))


def table_config(folder):
    source = {"kind": "parquet", "path": str(folder / "a.parquet"), "label_column": "label"}
    return encode_config(folder / "root", {**source, "caption_column": "caption"})


@pytest.mark.parametrize("column", ["image.bytes", "label", "caption"])
def test_a_damaged_page_of_a_table_is_one_line(column, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", FILES)
    group = pq.ParquetFile(path).metadata.row_group(1)
    (chunk,) = (group.column(at) for at in range(group.num_columns) if group.column(at).path_in_schema == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        encode_images(table_config(tmp_path))
    assert str(caught.value).startswith(f"{path}: row group 1 cannot be read (")
    assert str(caught.value).endswith("); copy or make the file again")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_caption_that_is_not_utf8_is_one_line(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", FILES, row_group=100)
    table = pq.read_table(path)
    captions = [b"a cat", *[b"a dog \xff"] * (len(FILES) - 1)]
    column = pa.array(captions, pa.binary()).view(pa.string())  # which asks for UTF-8, and does not look
    pq.write_table(table.set_column(2, "caption", column), path)
    with pytest.raises(
        UserError, match=r"a\.parquet: row group 0 cannot be read \(.*utf-8.*; copy or make the file again"
    ):
        encode_images(table_config(tmp_path))


@pytest.mark.parametrize(("captions", "type_"), [(pa.array([b"a cat"]), "binary"), (pa.array([[1]]), "list<")])
def test_a_caption_that_is_no_text_is_no_prompt(captions, type_, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", FILES)
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "caption", captions.take(pa.array([0] * len(FILES)))), path)
    with pytest.raises(UserError, match=rf"a\.parquet: caption holds {type_}.*, not texts"):
        encode_images(table_config(tmp_path))
    assert not (tmp_path / "root").exists()


def test_captions_that_repeat_may_be_stored_as_a_dictionary(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", FILES)
    plain = [image.prompt for image in listed(open_source(table_config(tmp_path).source))]
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "caption", table["caption"].combine_chunks().dictionary_encode()), path)
    assert [image.prompt for image in listed(open_source(table_config(tmp_path).source))] == plain
    assert "" not in plain


def test_a_table_that_is_damaged_after_it_was_listed_is_one_line(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", FILES)
    images = list(listed(open_source(table_config(tmp_path).source)))
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 2000 + data[2004:])
    with pytest.raises(UserError, match=r"a\.parquet: row 0 cannot be read \("):
        open_source(table_config(tmp_path).source).read(images[0])
