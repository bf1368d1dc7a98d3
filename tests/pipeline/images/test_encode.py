"""From images to a finished dataset: every image once, whoever makes it, however often it is begun."""

import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.real_images import CLASSES, NUM_IMAGES, caption, encode_config, image_files, write_captions, write_folder
from support.toy import files, samples, shard_bytes, toy_config

from configs.errors import RunStopped, UserError
from configs.schema import StatusConfig, VerifyShardsConfig
from pipeline.generate import generate_pairs
from pipeline.images import encode, encode_worker
from pipeline.images.encode import encode_images
from pipeline.images.encode_worker import EncodeWorker
from pipeline.images.transforms import to_image
from pipeline.inspect_dataset import status, verify_shards
from pipeline.shards.dataset import Dataset
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("source") / "images", image_files())


def folder_source(source, **entries):
    return {"kind": "folder", "path": str(source), "labels": "folders", **entries}


@pytest.fixture(scope="module")
def root(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("encoded") / "root"
    encode_images(encode_config(root, folder_source(source)))
    return root


def test_every_image_is_stored_once_with_its_class(root):
    stored = samples(root)
    assert list(stored) == [f"{i:09d}" for i in range(NUM_IMAGES)]
    for (members, row), (name, data) in zip(stored.values(), image_files().items(), strict=True):
        about = json.loads(members["json"])
        assert (row["name"], about["name"], members["txt"].decode()) == (name, name, name.split("/")[0])
        assert row["label"] == about["label"] == CLASSES.index(name.split("/")[0])
        assert row["source_sha256"] == about["source_sha256"]
        pixels = np.asarray(Image.open(io.BytesIO(members["png"])))
        np.testing.assert_array_equal(pixels, to_image(data, 16, "center_crop"))
    assert json.loads((root / "run.json").read_bytes())["spec"]["classes"] == CLASSES


def test_what_was_written_is_whole_and_says_what_it_is(root, capsys):
    findings = verify(Dataset.open_any(Storage.open(str(root))))
    assert (findings.problems, findings.missing, findings.num_samples) == ([], [], NUM_IMAGES)
    verify_shards(VerifyShardsConfig(root=str(root)))
    status(StatusConfig(root=str(root)))
    printed = capsys.readouterr().out
    assert "3 of 3 shards whole, 11 images" in printed
    assert "16 pixels by center_crop" in printed
    assert "sealed: complete" in printed
    card = (root / "README.md").read_text()
    assert "cat 6, dog 5" in card
    assert (root / "contact_sheet.png").exists()
    with pytest.raises(UserError, match="--deep"):
        verify_shards(VerifyShardsConfig(root=str(root), deep=1))


def test_a_plain_tar_reader_finds_every_sample(root):
    paths = pq.read_table(root / "manifest/shards.parquet")["path"].to_pylist()
    names = [name for path in paths for name in tarfile.open(root / path).getnames()]
    assert names == [f"{i:09d}.{suffix}" for i in range(NUM_IMAGES) for suffix in ("json", "png", "txt")]


def test_workers_and_batches_change_no_byte(root, source, tmp_path):
    config = encode_config(tmp_path / "root", folder_source(source), runtime={"batch_size": 1, "cpus_per_actor": 3})
    encode_images(config)
    assert shard_bytes(tmp_path / "root") == shard_bytes(root)
    run = json.loads((root / "run.json").read_bytes())
    for number in range(3):  # the commits go, and two workers make the shards in another order
        (tmp_path / f"root/commits/{number:06d}.json").unlink()
    workers = [EncodeWorker(config.output, run["fingerprint"], config.source, None, config.runtime) for _ in range(2)]
    made = [workers[number % 2].run(number) for number in (2, 1, 0)]
    assert not any(result.adopted for result in made)
    assert shard_bytes(tmp_path / "root") == shard_bytes(root)
    assert workers[0].run(1).adopted  # the other one had made it


def test_a_run_that_dies_goes_on_where_it_stopped(root, source, tmp_path, monkeypatch):
    config = encode_config(tmp_path / "root", folder_source(source), runtime={"max_errors_per_shard": 1})
    read = []

    def dies(source, image):
        read.append(image.name)
        if image.name == "dog/009.png":
            raise RuntimeError("the worker dies here")
        return original(source, image)

    original = encode_worker.read_listed
    with monkeypatch.context() as patched:
        patched.setattr(encode_worker, "read_listed", dies)
        with pytest.raises(RunStopped, match="1 of 3 shards are parked"):
            encode_images(config)
    assert sorted(path.name for path in (tmp_path / "root/commits").iterdir()) == ["000000.json", "000001.json"]
    read.clear()
    monkeypatch.setattr(encode_worker, "read_listed", lambda *given: read.append(given[1].name) or original(*given))
    encode_images(config)
    assert sorted(read) == list(image_files())[8:]  # the missing shard, and nothing else
    assert shard_bytes(tmp_path / "root") == shard_bytes(root)


def test_a_finished_dataset_is_left_alone(root, source, capsys):
    before = files(root)
    encode_images(encode_config(root, folder_source(source), runtime={"batch_size": 7}))
    assert "nothing to do" in capsys.readouterr().out
    assert files(root) == before


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"spec": {"resize": "scale"}}, "spec.resize is 'center_crop' there, 'scale' here"),
        ({"spec": {"image_size": 8}}, "spec.image_size is 16 there, 8 here"),
        ({"layout": {"samples_per_shard": 5}}, "layout.samples_per_shard is 4 there, 5 here"),
    ],
)
def test_other_settings_are_another_dataset(root, source, sections, message):
    before = files(root)
    with pytest.raises(UserError, match=message):
        encode_images(encode_config(root, folder_source(source), **sections))
    assert files(root) == before


def test_other_images_are_another_dataset(root, tmp_path):
    changed = image_files()
    changed["dog/010.png"] = changed["cat/000.png"]
    source = write_folder(tmp_path / "images", changed)
    with pytest.raises(UserError, match="sources_digest"):
        encode_images(encode_config(root, folder_source(source)))


def test_an_image_that_changes_under_the_run_stops_it(tmp_path, monkeypatch):
    copy = write_folder(tmp_path / "images", image_files())

    def listed_then_changed(found):
        images = list(original(found))
        (copy / "cat/001.png").write_bytes(b"something else")
        return images

    original = encode.listed
    monkeypatch.setattr(encode, "listed", listed_then_changed)
    with pytest.raises(UserError, match=r"cat/001\.png is no longer what it was"):
        encode_images(encode_config(tmp_path / "root", folder_source(copy)))
    assert not (tmp_path / "root/commits/000000.json").exists()


def test_captions_replace_the_names_of_classes(source, tmp_path):
    table = write_captions(tmp_path / "captions.csv", image_files())
    encode_images(encode_config(tmp_path / "root", folder_source(source, captions=str(table))))
    found = [members["txt"].decode() for members, _ in samples(tmp_path / "root").values()]
    assert found == [caption(name) for name in image_files()]


def test_whatever_the_classes_are_called_the_card_has_a_table(tmp_path):
    (first, second) = list(image_files().values())[:2]
    source = write_folder(tmp_path / "images", {"cat | dog/0.png": first, "horse/1.png": second})
    encode_images(encode_config(tmp_path / "root", folder_source(source)))
    assert "\n| classes | cat \\| dog 1, horse 1 |\n" in (tmp_path / "root/README.md").read_text()


def test_images_are_no_pairs_and_pairs_no_images(root, tmp_path):
    with pytest.raises(UserError, match="holds real images, and pairs are needed"):
        Dataset.open(Storage.open(str(root)))
    with pytest.raises(UserError, match="holds images, not pairs; name a new output"):
        generate_pairs(toy_config(root, tmp_path))


def test_damage_is_found_and_mended(root, source, tmp_path):
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    commit = json.loads((copy / "commits/000001.json").read_bytes())
    tar = copy / commit["path"]
    data = bytearray(tar.read_bytes())
    data[2000] ^= 1
    tar.chmod(0o644)
    tar.write_bytes(bytes(data))
    (copy / "sources.parquet").write_bytes(b"no list")
    findings = verify(Dataset.open_any(Storage.open(str(copy))))
    assert list(findings.damaged) == [1]
    assert findings.table == ["sources.parquet: not a Parquet file, or a damaged one"]
    with pytest.raises(RunStopped):
        verify_shards(VerifyShardsConfig(root=str(copy), repair=True))
    encode_images(encode_config(copy, folder_source(source)))
    assert verify(Dataset.open_any(Storage.open(str(copy)))).problems == []
    assert shard_bytes(copy) == shard_bytes(root)
