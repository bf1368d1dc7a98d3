"""Shards and records that are made to hurt, and whose hashes are right: refused by name, in bounded memory."""

import hashlib
import io
import json
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.bounds import MEGABYTE, at_most
from support.forge import SHARD, members, recommit, record, reindexed, tar_of
from support.hostile_arrays import ARRAYS
from support.toy import toy_config

from configs.errors import RunStopped, UserError
from configs.schema import StatusConfig
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import status
from pipeline.shards.dataset import Dataset
from pipeline.shards.members import decode_array, decode_image, encode_image
from pipeline.shards.reader import PairReader
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    spec = {"pairs_per_prompt": 4, "num_samples": 16}
    generate_pairs(toy_config(folder / "root", folder, spec=spec, layout={"samples_per_shard": 4}))
    (folder / "root/SEALED.json").unlink()
    return folder / "root"


@pytest.fixture
def root(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "root")


def refused(root: Path) -> tuple[str, str]:
    """What ``verify`` says of a shard, and how the trainer's reader stops."""
    (found,) = verify(Dataset.open(Storage.open(str(root)))).damaged.values()
    options = {"seed": 0, "window": 1, "holdout": 0, "selection": None, "cache_folder": root, "cache_bytes": 0}
    reader = PairReader(str(root), allow_partial=True, **options)
    with pytest.raises(RunStopped) as caught:
        reader.read(range(reader.num_samples))
    assert "\n" not in found + str(caught.value)
    assert found.startswith(f"shard {SHARD}: ")
    assert str(caught.value).startswith(f"shard {SHARD}: ")
    return found, str(caught.value)


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, linkname: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, linkname
    return info.tobuf(tarfile.USTAR_FORMAT)


FIRST = f"{4 * SHARD:09d}.json"
MEMBERS = {
    "an absolute path": header("/tmp/hostile-canary", size=0),
    "a path that leads out": header("../../../hostile-canary"),
    "a symbolic link": header(FIRST, tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": header(FIRST, tarfile.LNKTYPE, linkname="../../run.json"),
    "a device": header(FIRST, tarfile.CHRTYPE),
    "a pipe": header(FIRST, tarfile.FIFOTYPE),
    "a folder": header(FIRST, tarfile.DIRTYPE),
    "a size of 8 GB": header(FIRST, size=8**11 - 1),
    "a size below nothing": header(FIRST).replace(b"00000000000\0", b"-0000000001\0", 1),
}


@pytest.mark.parametrize("first", MEMBERS.values(), ids=MEMBERS)
def test_members_that_are_no_files_of_a_sample(root, first):
    """The first member of a shard is replaced; record and index say that all is well."""
    tar = (root / record(root)["path"]).read_bytes()
    before = {path for path in root.parent.rglob("*")}
    recommit(root, tar=first + tar[512:])
    with at_most(64 * MEGABYTE):
        refused(root)
    assert {path for path in root.parent.rglob("*")} == before
    assert not Path("/tmp/hostile-canary").exists()


@pytest.mark.parametrize("suffix", ["json", "txt", "png", "x0.npy"])
def test_a_member_of_a_gigabyte_is_not_read(root, suffix):
    """Sparse on the disk, and as long as its header says."""
    path, size = root / record(root)["path"], 1 << 28
    with path.open("r+b") as file:
        with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
            info = next(info for info in tar if info.name.endswith(suffix))
        file.seek(info.offset)
        file.write(header(info.name, size=size))
        file.truncate(info.offset_data + size)
    (root / f"commits/{SHARD:06d}.json").write_text(
        json.dumps(record(root) | {"sha256": _sha256(path), "num_bytes": path.stat().st_size})
    )
    with at_most(64 * MEGABYTE):
        assert "bytes, which no sample has" in refused(root)[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("data", ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_promise_too_much(data):
    with at_most(4 * MEGABYTE), pytest.raises(ValueError, match=r"\S"):
        decode_array(data)


def test_an_array_as_it_is_stored_is_taken_in_either_order():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for one in (array, np.asfortranarray(array), array[:, 1], array[0, 0, 0]):
        buffer = io.BytesIO()
        np.save(buffer, one)
        found = decode_array(buffer.getvalue())
        np.testing.assert_array_equal(found, one)
        assert found.flags.writeable


def test_a_picture_of_a_hundred_megapixels_is_not_decoded(root):
    bomb = io.BytesIO()
    rows = zlib.compress(bytes(12_000 * 12_001), 9)  # 12,000 x 12,000 grey pixels in 140 kB
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    bomb.write(b"\x89PNG\r\n\x1a\n")
    for kind, data in chunks:
        bomb.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    with at_most(4 * MEGABYTE), pytest.raises(ValueError, match="found an image of 12000 x 12000, expected 8 x 8"):
        decode_image(bomb.getvalue(), (8, 8))
    forged = tar_of([(name, bomb.getvalue() if name.endswith("png") else data) for name, data in members(root)])
    recommit(root, tar=forged, index=reindexed(root, forged))
    with at_most(64 * MEGABYTE):
        assert "found an image of 12000 x 12000" in verify(Dataset.open(Storage.open(str(root)))).damaged[SHARD]


def test_pictures_of_other_kinds_are_none():
    image = np.zeros((8, 8, 3), np.uint8)
    for kind in ("png", "webp", "jpg"):
        assert decode_image(encode_image(image, kind), (8, 8)).shape == (8, 8, 3)
    for kind in ("GIF", "TIFF", "BMP", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind)
        with pytest.raises(ValueError, match="no image"):
            decode_image(buffer.getvalue())


@pytest.mark.parametrize("name", ["run.json", "SEALED.json", "commits/000001.json", "lease.json"])
def test_records_nested_without_end(root, name):
    (root / name).write_bytes(b'{"spec": ' + b"[" * 100_000)
    with pytest.raises((RunStopped, UserError), match=name) as caught:
        status(StatusConfig(root=str(root)))
    assert "\n" not in str(caught.value)


def test_a_json_member_nested_without_end(root):
    forged = tar_of([(name, b"[" * 100_000 if name.endswith("json") else data) for name, data in members(root)])
    recommit(root, tar=forged, index=reindexed(root, forged))
    assert "nested too deeply" in verify(Dataset.open(Storage.open(str(root)))).damaged[SHARD]
