"""Forgeries whose hashes are right are found, and nothing else is called damage. Damaged bytes: tests/faults."""

import errno
import json
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.forge import SHARD, flip, index_with, members, recommit, record, reindexed, tar_of, with_column
from support.tiny_sd import build
from support.toy import files, shard_bytes, toy_config

from configs.schema import StableDiffusionTeacherConfig, VerifyShardsConfig
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import verify_shards
from pipeline.prompts import PromptTable, prepare_prompts
from pipeline.shards import check_manifest, manifest, storage
from pipeline.shards.check_shard import _next
from pipeline.shards.dataset import Dataset
from pipeline.shards.manifest import seal, write_manifest
from pipeline.shards.members import decode_array, decode_image, npy
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    config = toy_config(folder / "root", folder)
    generate_pairs(config)
    return config, folder / "root"


@pytest.fixture
def root(pristine, tmp_path):
    shutil.copytree(pristine[1], tmp_path / "root")
    return tmp_path / "root"


def find(root):
    return verify(Dataset.open(Storage.open(str(root))))


def test_a_whole_dataset_has_no_findings(root):
    findings = find(root)
    assert (len(findings.whole), findings.num_samples) == (5, 40)
    assert (findings.missing, findings.problems, findings.unreferenced) == ([], [], [])


def test_a_commit_beyond_the_end_is_found(root):
    (root / "commits/000009.json").write_bytes((root / "commits/000002.json").read_bytes())
    assert "shard 9: the dataset has only 5" in find(root).damaged[9]


def edit_json(entries, **changes):
    return [(n, json.dumps(json.loads(d) | changes).encode() if n.endswith("json") else d) for n, d in entries]


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda e: e[:-1], "member 000000023.x0.npy is missing"),
        (lambda e: [*e, ("999999999.txt", b"x")], "member 999999999.txt is not in the index"),
        (lambda e: [e[1], e[0], *e[2:]], "member 000000016.json is missing"),
        (lambda e: [(n, b"a pink elephant" if n.endswith("txt") else d) for n, d in e], "txt of 000000016"),
        (lambda e: [(n, d[:-4] + b"\0\0\0\0" if "noise" in n else d) for n, d in e], "noise of 000000016"),
        (lambda e: [(n, d[:-2] + b"\0\x7c" if "x0" in n else d) for n, d in e], "x0 of 000000016 finite"),
        (lambda e: [(n, b"no picture" if n.endswith("png") else d) for n, d in e], "cannot be read"),
        (lambda e: edit_json(e, guidance_scale=3.0), "json guidance_scale of 000000016"),
        (lambda e: edit_json(e, seed=8), "json seed of 000000016"),
        (lambda e: edit_json(e, fingerprint="0" * 64), "json fingerprint of 000000016"),
        (lambda e: edit_json(e, another=1), "json keys of 000000016"),
        (lambda e: [(n, b"[1, 2]" if n.endswith("json") else d) for n, d in e], "json keys of 000000016"),
        (lambda e: [(n, b"\x80\x04N." if n.endswith("npy") else d) for n, d in e], "cannot be read"),
    ],
)
def test_forged_contents_with_a_consistent_record_are_found(root, forge, message):
    recommit(root, tar=tar_of(forge(members(root))))
    assert message in find(root).damaged[SHARD]


@pytest.mark.parametrize(
    ("column", "edit", "message"),
    [
        ("key", lambda v: v[::-1], "index keys"),
        ("key", lambda v: [v[0], *v[:-1]], "index keys"),
        ("offset", lambda v: [o + 512 for o in v], "offset of 000000016"),
        ("noise_digest", lambda v: ["0" * 16, *v[1:]], "noise_digest of 000000016"),
        ("prompt", lambda v: ["a pink elephant", *v[1:]], "prompt of 000000016"),
        ("status", lambda v: ["rejected", *v[1:]], "rejected samples"),
        ("status", lambda v: ["good", *v[1:]], "number of samples"),
        ("reason", lambda v: ["x0 is constant", *v[1:]], "reason of 000000016"),
        ("length", lambda v: [v[0] + 512, *v[1:]], "length of 000000016"),
        ("row", lambda v: [v[1], v[0], *v[2:]], "row of 000000016"),
        ("shard", lambda v: [3] * len(v), "shard of 000000016"),
        ("guidance_scale", lambda v: [1.5] * len(v), "guidance_scale of 000000016"),
        ("seed", lambda v: [8] * len(v), "seed of 000000016"),
        ("prompt_truncated", lambda v: [True, *v[1:]], "number of truncated"),
    ],
)
def test_a_forged_index_with_a_consistent_record_is_found(root, column, edit, message):
    recommit(root, index=index_with(root, column, edit))
    assert message in find(root).damaged[SHARD]


def test_another_prompt_table_is_found(root, pristine, tmp_path):
    (tmp_path / "other.txt").write_text("a\nb\nc\nd\ne\n")
    (root / "prompts.parquet").unlink()
    prompts = pristine[0].prompts.model_copy(update={"path": str(tmp_path / "other.txt")})
    prepare_prompts(prompts, root / "prompts.parquet")
    assert find(root).problems == ["prompts.parquet: is not the table of this dataset"]


def test_a_dataset_in_the_making_is_whole_as_far_as_it_goes(root):
    (root / "SEALED.json").unlink()
    (root / "commits/000004.json").unlink()
    findings = find(root)
    assert (findings.missing, findings.problems) == ([4], [])


def test_a_sealed_dataset_that_lost_a_commit_is_damaged(root):
    (root / "commits/000004.json").unlink()
    assert "1 shards of a sealed dataset have no commit record" in find(root).manifest[0]


# ---------------------------------------------------------------------------------------------- what is no damage


@pytest.mark.parametrize("good_reads", [0, 1, 2])
def test_an_error_of_the_storage_is_no_finding_and_withdraws_nothing(root, monkeypatch, good_reads):
    original, calls = Storage.read_range, []

    def read_range(self, path, start, length):
        if "-000002-" in path:
            calls.append(path)
            if len(calls) == good_reads + 1:  # once: the next read would do
                raise OSError(errno.EIO, "the disk does not answer", path)
        return original(self, path, start, length)

    monkeypatch.setattr(storage, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(Storage, "read_range", read_range)
    before = files(root)
    with pytest.raises(OSError, match="the disk does not answer"):
        find(root)
    calls.clear()
    with pytest.raises(OSError, match="the disk does not answer"):
        verify_shards(VerifyShardsConfig(root=str(root), repair=True))
    assert files(root) == before


@pytest.mark.parametrize("at", range(0, 120, 3))
def test_damaged_members_are_value_errors_wherever_they_are_damaged(root, at):
    contents = dict(members(root))
    image, array = contents["000000016.png"], contents["000000016.x0.npy"]
    for decode, data in ((decode_image, image[: at + 1]), (decode_array, array[: at + 1])):
        with pytest.raises(ValueError, match=r"\S"):
            decode(data)
    for decode, data in ((decode_image, flip(image, at % len(image))), (decode_array, flip(array, at))):
        try:
            decode(data)
        except ValueError:
            pass  # anything else fails the test


def test_a_damaged_header_that_numpy_cannot_tokenize_is_a_value_error():
    header = npy(np.zeros((3, 8, 8), np.float16))
    with pytest.raises(ValueError, match="no array"):
        decode_array(header.replace(b"), }", b"(, }"))


# ------------------------------------------------------------------------------------------------- text embeddings


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Two pairs of a latent teacher with their text embeddings."""
    folder = tmp_path_factory.mktemp("embedded")
    config = toy_config(
        folder / "root",
        folder,
        teacher=StableDiffusionTeacherConfig(path=str(build(folder / "sd"))),
        spec={
            "sampler": {"name": "diffusers", "steps": 2},
            "num_samples": 2,
            "fields": {"text_embedding": True, "image": "none"},
        },
    )
    generate_pairs(config)
    return folder / "root"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a, None),
        (lambda a: a.astype(np.float32), "text_embedding of 000000000: found"),
        (lambda a: a[0], "text_embedding of 000000000: found"),
        (lambda a: a + np.float16("inf"), "text_embedding of 000000000 finite"),
    ],
)
def test_text_embeddings_are_checked(embedded, tmp_path, edit, message):
    root = shutil.copytree(embedded, tmp_path / "root")
    entries = [(n, npy(edit(decode_array(d))) if "text_emb" in n else d) for n, d in members(root, 0)]
    assert len(entries) == 10
    forged = tar_of(entries)
    recommit(root, tar=forged, index=reindexed(root, forged, 0), shard=0)
    (root / "SEALED.json").unlink()
    found = find(root).damaged
    assert found == {} if message is None else message in found[0]


# --------------------------------------------------------------------------------- prompts, manifest, bounded memory


def test_a_damaged_prompt_table_is_one_finding_and_no_shard_is_blamed(root):
    path = root / "prompts.parquet"
    path.write_bytes(flip(path.read_bytes(), path.stat().st_size // 4))
    findings = find(root)
    assert len(findings.table) == 1
    assert findings.table[0].startswith("prompts.parquet: ")
    assert findings.damaged == {}
    path.unlink()
    assert find(root).problems == ["prompts.parquet is missing"]


def test_the_prompt_table_is_opened_once_a_thread(tmp_path, monkeypatch):
    generate_pairs(toy_config(tmp_path / "root", tmp_path, layout={"samples_per_shard": 2}))
    opened, original = [], PromptTable.open
    monkeypatch.setattr(PromptTable, "open", lambda *a: opened.append(a) or original(*a))
    assert len(find(tmp_path / "root").whole) == 20
    assert len(opened) <= 1 + 4


def test_a_walk_through_a_tar_remembers_no_members(root):
    with tarfile.open(root / record(root)["path"], mode="r|") as tar:
        names = []
        while (info := _next(tar)) is not None:
            names.append(info.name)
            assert tar.members == []
    assert names == [name for name, _ in members(root)]


def edit_table(path, column, edit):
    pq.write_table(with_column(pq.read_table(path), column, edit), path)


def edit_seal(root, **changes):
    (root / "SEALED.json").write_text(json.dumps(json.loads((root / "SEALED.json").read_bytes()) | changes))


SHARDS, SAMPLES = "manifest/shards.parquet", "manifest/samples-00000.parquet"
MANIFEST_DAMAGE = {
    "another path": (
        lambda r: edit_table(r / SHARDS, "path", lambda v: v[::-1]),
        f"{SHARDS}: what it says of shard 0 is not so",
    ),
    "another last key": (
        lambda r: edit_table(r / SHARDS, "last_key", lambda v: [*v[:-1], "000000040"]),
        f"{SHARDS}: what it says of shard 4 is not so",
    ),
    "a shard less": (
        lambda r: pq.write_table(pq.read_table(r / SHARDS).slice(0, 4), r / SHARDS),
        f"{SHARDS}: what it says of shard 4 is not so",
    ),
    "a key twice": (
        lambda r: edit_table(r / SAMPLES, "key", lambda v: [v[0], *v[:-1]]),
        f"{SAMPLES}: what it says of shard 0 is not so",
    ),
    "a sample less": (
        lambda r: pq.write_table(pq.read_table(r / SAMPLES).slice(0, 39), r / SAMPLES),
        f"{SAMPLES}: what it says of shard 4 is not so",
    ),
    "a sample more": (
        lambda r: pq.write_table(pa.concat_tables([t := pq.read_table(r / SAMPLES), t.slice(0, 1)]), r / SAMPLES),
        f"{SAMPLES}: has more rows than the dataset",
    ),
    "other columns": (
        lambda r: pq.write_table(pq.read_table(r / SAMPLES).drop(["seed"]), r / SAMPLES),
        f"{SAMPLES}: has other columns",
    ),
    "no samples": (lambda r: (r / SAMPLES).unlink(), f"{SAMPLES} is missing"),
    "no shards": (lambda r: (r / SHARDS).unlink(), f"{SHARDS} is missing"),
    "a truncated table": (
        lambda r: (r / SAMPLES).write_bytes((r / SAMPLES).read_bytes()[:-100]),
        f"{SAMPLES}: cannot be read",
    ),
    "a part of an earlier manifest": (
        lambda r: shutil.copy(r / SAMPLES, r / "manifest/samples-00001.parquet"),
        "manifest/samples-00001.parquet is not part of the manifest",
    ),
    "a seal that is no JSON": (lambda r: (r / "SEALED.json").write_text("{"), "SEALED.json: not JSON"),
    "a seal that is a list": (lambda r: (r / "SEALED.json").write_text("[]"), "SEALED.json: not a record"),
    "another count": (lambda r: edit_seal(r, num_samples=41), "SEALED.json: num_samples is not that of the commit"),
    "another content": (lambda r: edit_seal(r, content_sha256="0"), "SEALED.json: content_sha256 is not that of"),
    "another fingerprint": (lambda r: edit_seal(r, fingerprint="0"), "SEALED.json: fingerprint is not that of"),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGE)
def test_a_damaged_manifest_is_found_and_written_again(root, pristine, damage):
    edit, message = MANIFEST_DAMAGE[damage]
    edit(root)
    findings = find(root)
    assert findings.problems == findings.manifest
    (problem,) = findings.manifest
    assert problem.startswith(message)
    verify_shards(VerifyShardsConfig(root=str(root), repair=True))
    generate_pairs(pristine[0].model_copy(update={"output": str(root)}))
    assert find(root).problems == []
    assert files(root / "commits") == files(pristine[1] / "commits")
    assert files(root / "manifest") == files(pristine[1] / "manifest")
    assert shard_bytes(root) == shard_bytes(pristine[1])


def test_a_manifest_in_several_parts_is_checked_in_batches(root, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_PART", 12)
    monkeypatch.setattr(check_manifest, "_ROWS_PER_BATCH", 3)
    dataset = Dataset.open(Storage.open(str(root)))
    seal(dataset, write_manifest(dataset))
    parts = [root / f"manifest/samples-0000{part}.parquet" for part in range(3)]
    assert [pq.read_metadata(part).num_rows for part in parts] == [16, 16, 8]
    assert find(root).problems == []
    edit_table(parts[1], "prompt", lambda v: [*v[:-1], "a pink elephant"])
    assert find(root).manifest == ["manifest/samples-00001.parquet: what it says of shard 3 is not so"]
    parts[1].unlink()
    assert find(root).manifest == ["manifest/samples-00001.parquet is missing"]


def test_a_manifest_written_again_leaves_no_parts_of_the_one_before(root, monkeypatch):
    dataset = Dataset.open(Storage.open(str(root)))
    monkeypatch.setattr(manifest, "ROWS_PER_PART", 12)
    assert write_manifest(dataset)["sample_tables"] == 3
    monkeypatch.undo()
    assert write_manifest(dataset)["sample_tables"] == 1
    assert [path.name for path in sorted((root / "manifest").iterdir())] == ["samples-00000.parquet", "shards.parquet"]
