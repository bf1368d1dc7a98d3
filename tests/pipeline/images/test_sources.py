"""The same images are the same dataset, wherever they lie; classes and prompts are read as they are meant."""

import hashlib
import json

import pytest
from pydantic import TypeAdapter
from support.real_images import (
    CLASSES,
    caption,
    image_files,
    write_captions,
    write_folder,
    write_parquet,
    write_tars,
    write_zip,
)

from configs.encode_schema import ImageSource
from configs.errors import UserError
from pipeline.images.source import listed, open_source, read_listed
from pipeline.images.source_table import SourceTable, write_source_table
from pipeline.shards.storage import Storage

FILES = image_files()
LABELS = [CLASSES.index(name.split("/")[0]) for name in FILES]


def source(kind, path, **entries):
    return open_source(TypeAdapter(ImageSource).validate_python({"kind": kind, "path": str(path), **entries}))


def digest(images, folder):
    return write_source_table(folder / "list.parquet", images).digest


def test_a_folder_and_an_archive_of_it_are_the_same_images(tmp_path):
    folder = source("folder", write_folder(tmp_path / "images", FILES), labels="folders")
    archive = source("zip", write_zip(tmp_path / "images.zip", FILES), labels="folders")
    images, packed = list(listed(folder)), list(listed(archive))
    assert [image.name for image in images] == list(FILES)
    assert [image.label for image in images] == LABELS
    assert folder.classes == archive.classes == tuple(CLASSES)
    assert digest(images, tmp_path) == digest(packed, tmp_path)


@pytest.mark.parametrize("kind", ["webdataset", "struct", "bytes"])
def test_tars_and_tables_have_the_same_images_classes_and_prompts(kind, tmp_path):
    if kind == "webdataset":
        found = source(kind, write_tars(tmp_path / "tars", FILES))
    else:
        path = write_parquet(tmp_path / "table.parquet", FILES, struct=kind == "struct")
        found = source("parquet", path, label_column="label", caption_column="caption")
    images = list(listed(found))
    assert [image.sha256 for image in images] == [hashlib.sha256(data).hexdigest() for data in FILES.values()]
    assert [read_listed(found, image) for image in reversed(images)] == list(reversed(FILES.values()))
    assert [image.label for image in images] == LABELS
    assert [image.prompt for image in images] == [caption(name) for name in FILES]


def test_a_list_is_read_back_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.images.source_table._ROW_GROUP", 4)
    images = list(listed(source("folder", write_folder(tmp_path / "images", FILES))))
    written = digest(images, tmp_path)
    table = SourceTable.open(Storage.open(str(tmp_path)), "list.parquet")
    table.verify()
    assert (table.digest, table.num_images) == (written, len(FILES))
    for start, stop in ((0, 11), (3, 9), (4, 8), (10, 11), (5, 5)):
        assert table.rows(start, stop) == images[start:stop]
    assert digest(images[::-1], tmp_path) != written


def test_the_digest_knows_class_and_prompt(tmp_path):
    folder = write_folder(tmp_path / "images", FILES)
    captions = str(write_captions(tmp_path / "captions.csv", FILES))
    variants = [{}, {"labels": "folders"}, {"captions": captions}, {"labels": "folders", "captions": captions}]
    assert len({digest(listed(source("folder", folder, **entries)), tmp_path) for entries in variants}) == 4


def test_classes_of_a_dataset_json(tmp_path):
    numbers = {name: at % 3 for at, name in enumerate(FILES)}
    text = json.dumps({"labels": list(numbers.items())}).encode()
    found = source("zip", write_zip(tmp_path / "a.zip", {**FILES, "dataset.json": text}), labels="dataset.json")
    assert [(image.name, image.label) for image in listed(found)] == list(numbers.items())
    assert found.ignored == {}
    plain = source("zip", tmp_path / "a.zip")
    assert {image.label for image in listed(plain)} == {-1}
    assert plain.ignored == {".json": 1}


def test_what_is_no_image_is_counted(tmp_path):
    folder = write_folder(tmp_path / "images", {**FILES, "a.txt": b"", "cat/b.TXT": b"", "Makefile": b""})
    found = source("folder", folder)
    assert len(list(listed(found))) == len(FILES)
    assert found.ignored == {".txt": 2, "Makefile": 1}


MISTAKES = {
    "no such folder": ("folder", lambda at: at / "nowhere", {}, "holds no image"),
    "no image": ("folder", lambda at: write_folder(at / "x", {"a.gif": b""}), {}, "holds no image"),
    "an image in no class": (
        "folder",
        lambda at: write_folder(at / "x", {**FILES, "z.png": b""}),
        {"labels": "folders"},
        r"z\.png of .* lies in none",
    ),
    "no dataset.json": ("folder", lambda at: write_folder(at / "x", FILES), {"labels": "dataset.json"}, "is not there"),
    "a class too few": (
        "folder",
        lambda at: write_folder(at / "x", {**FILES, "dataset.json": b'{"labels": [["cat/000.png", 1]]}'}),
        {"labels": "dataset.json"},
        r"gives cat/001\.png no class",
    ),
    "no classes": (
        "folder",
        lambda at: write_folder(at / "x", {**FILES, "dataset.json": b"[" * 100_000}),
        {"labels": "dataset.json"},
        "does not hold",
    ),
    "no labels in it": (
        "folder",
        lambda at: write_folder(at / "x", {**FILES, "dataset.json": b'{"labels": null}'}),
        {"labels": "dataset.json"},
        "does not hold",
    ),
    "no archive": ("zip", lambda at: at / "none.zip", {}, "there is no"),
    "another archive": ("zip", lambda at: write_folder(at, {"a.zip": b"PK\x03"}) / "a.zip", {}, "is no zip archive"),
    "no tar": ("webdataset", lambda at: write_folder(at / "x", FILES), {}, "holds no .tar"),
    "no table": (
        "parquet",
        lambda at: write_folder(at, {"a.parquet": b"PAR1"}) / "a.parquet",
        {},
        "not a Parquet file",
    ),
    "no column": (
        "parquet",
        lambda at: write_parquet(at / "a.parquet", FILES),
        {"image_column": "imaeg"},
        "no column imaeg.*image",
    ),
    "no bytes": (
        "parquet",
        lambda at: write_parquet(at / "a.parquet", FILES),
        {"image_column": "caption"},
        "caption holds string, not bytes",
    ),
    "no class in a column": (
        "parquet",
        lambda at: write_parquet(at / "a.parquet", FILES),
        {"label_column": "caption"},
        "caption of row 0 is 'the picture 000 of a cat', not a class",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path):
    kind, make, entries, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as caught:
        list(listed(source(kind, make(tmp_path), **entries)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"names dog/010\.png .* not; add"),
        (lambda rows: [*rows, rows[0]], r"names cat/000\.png twice"),
    ],
)
def test_captions_name_every_image_once(change, message, tmp_path):
    folder = write_folder(tmp_path / "images", FILES)
    rows = [json.dumps({"file_name": name, "text": caption(name)}) for name in FILES]
    (tmp_path / "captions.jsonl").write_text("\n".join(change(rows)))
    with pytest.raises(UserError, match=message):
        list(listed(source("folder", folder, captions=str(tmp_path / "captions.jsonl"))))
