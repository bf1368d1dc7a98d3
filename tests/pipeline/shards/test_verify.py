"""Everything that can happen to a dataset at rest is found, and the shard is named."""

import io
import json
import shutil
import tarfile
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.toy import files, shard_bytes, toy_config

from configs.errors import RunStopped, UserError
from configs.schema import VerifyShardsConfig
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import verify_shards
from pipeline.shards import verify as module
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import sha256_hex
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify

SHARD = 2


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


def record(root, shard=SHARD):
    return json.loads((root / f"commits/{shard:06d}.json").read_bytes())


def rewrite(root, edit, shard=SHARD):
    """Edit a shard's tar in place, leaving its record as it is."""
    path = root / record(root, shard)["path"]
    path.write_bytes(edit(path.read_bytes()))


def recommit(root, tar=None, index=None, shard=SHARD):
    """Forge a consistent record around other bytes: only what the bytes *say* can give the forgery away."""
    about = record(root, shard)
    if tar is not None:
        (root / about["path"]).write_bytes(tar)
        about |= {"sha256": sha256_hex(tar), "num_bytes": len(tar)}
    if index is not None:
        sink = io.BytesIO()
        pq.write_table(index, sink)
        (root / about["index_path"]).write_bytes(sink.getvalue())
        about["index_sha256"] = sha256_hex(sink.getvalue())
    (root / f"commits/{shard:06d}.json").write_text(json.dumps(about))


def members(root, shard=SHARD):
    with tarfile.open(root / record(root, shard)["path"]) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def tar_of(entries):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o444
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def index_with(root, column, edit, shard=SHARD):
    table = pq.read_table(root / record(root, shard)["index_path"])
    at = table.schema.get_field_index(column)
    values = edit(table.column(column).to_pylist())
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


def test_a_whole_dataset_has_no_findings(root):
    findings = find(root)
    assert (len(findings.whole), findings.num_samples) == (5, 40)
    assert (findings.missing, findings.problems, findings.unreferenced) == ([], [], [])


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


BLOCK = 512
DAMAGE = {
    "a header byte is flipped": lambda d: flip(d, 5 * BLOCK + 3),
    "a header is zeroed": lambda d: d[:BLOCK] + bytes(BLOCK) + d[2 * BLOCK :],
    "cut within a header": lambda d: d[: 10 * BLOCK + 100],
    "cut at a member boundary": lambda d: d[: (len(d) // 2) // BLOCK * BLOCK],
    "cut within a payload": lambda d: d[: 6 * BLOCK + 77],
    "a payload byte is flipped": lambda d: flip(d, 2 * BLOCK + 200),
    "the last byte is flipped": lambda d: flip(d, len(d) - 1),
    "something is appended": lambda d: d + bytes(BLOCK),
    "it is empty": lambda d: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_bytes_are_found_and_the_shard_is_named(root, damage):
    rewrite(root, DAMAGE[damage])
    findings = find(root)
    assert list(findings.damaged) == [SHARD]
    assert findings.damaged[SHARD].startswith(f"shard {SHARD}: ")
    assert "sha256 is not the one recorded" in findings.damaged[SHARD]


def test_missing_files_are_found(root):
    (root / record(root, 1)["path"]).unlink()
    (root / record(root, 3)["index_path"]).unlink()
    damaged = find(root).damaged
    assert list(damaged) == [1, 3]
    assert all("is missing" in text for text in damaged.values())


def test_swapped_shards_are_found(root):
    one, other = (root / record(root, shard)["path"] for shard in (1, 2))
    one_bytes, other_bytes = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_bytes)
    other.write_bytes(one_bytes)
    assert list(find(root).damaged) == [1, 2]


def test_a_stale_index_is_found(root):
    about = record(root, 1)
    (root / about["index_path"]).write_bytes((root / record(root, 2)["index_path"]).read_bytes())
    assert "its sha256 is not the one recorded" in find(root).damaged[1]


def test_a_swapped_commit_record_is_found(root):
    (root / "commits/000001.json").write_bytes((root / "commits/000002.json").read_bytes())
    assert "holds the commit record of shard 2" in find(root).damaged[1]


def test_the_commit_record_of_another_dataset_is_found(root):
    path = root / "commits/000001.json"
    path.write_text(json.dumps(record(root, 1) | {"fingerprint": "0" * 64}))
    assert "belongs to dataset 000000000000" in find(root).damaged[1]


def test_a_commit_beyond_the_end_is_found(root):
    (root / "commits/000009.json").write_bytes((root / "commits/000002.json").read_bytes())
    assert "shard 9: the dataset has only 5" in find(root).damaged[9]


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
    ],
)
def test_a_forged_index_with_a_consistent_record_is_found(root, column, edit, message):
    recommit(root, index=index_with(root, column, edit))
    assert message in find(root).damaged[SHARD]


def test_an_edited_run_record_is_refused(root):
    run = json.loads((root / "run.json").read_bytes())
    run["spec"]["seed"] = 8
    (root / "run.json").write_text(json.dumps(run))
    with pytest.raises(RunStopped, match=r"run.json: the spec does not match its fingerprint"):
        verify_shards(VerifyShardsConfig(root=str(root)))


def test_another_prompt_table_is_found(root, pristine, tmp_path):
    from pipeline.prompts import prepare_prompts

    (tmp_path / "other.txt").write_text("a\nb\nc\nd\ne\n")
    (root / "prompts.parquet").unlink()
    prompts = pristine[0].prompts.model_copy(update={"path": str(tmp_path / "other.txt")})
    prepare_prompts(prompts, root / "prompts.parquet")
    assert find(root).problems == ["prompts.parquet: is not the prompt table of this dataset"]


def test_a_dataset_in_the_making_is_whole_as_far_as_it_goes(root):
    (root / "SEALED.json").unlink()
    (root / "commits/000004.json").unlink()
    findings = find(root)
    assert (findings.missing, findings.problems) == ([4], [])


def test_a_sealed_dataset_that_lost_a_commit_is_damaged(root):
    (root / "commits/000004.json").unlink()
    assert "1 shards of a sealed dataset have no commit record" in find(root).manifest[0]


def test_repair_makes_exactly_the_damaged_shards_again(root, pristine, capsys):
    rewrite(root, DAMAGE["a payload byte is flipped"])
    (root / record(root, 4)["path"]).unlink()
    with pytest.raises(RunStopped, match=r"2 problems; --repair withdraws"):
        verify_shards(VerifyShardsConfig(root=str(root)))
    kept = {name: data for name, data in files(root / "commits").items() if name not in ("000002.json", "000004.json")}
    verify_shards(VerifyShardsConfig(root=str(root), repair=True))
    assert files(root / "commits") == kept
    generate_pairs(pristine[0].model_copy(update={"output": str(root)}))
    assert shard_bytes(root) == shard_bytes(pristine[1])
    verify_shards(VerifyShardsConfig(root=str(root)))
    assert "5 of 5 shards whole, 40 pairs" in capsys.readouterr().out


def test_unreferenced_files_are_counted_and_old_ones_deleted(root, monkeypatch, capsys):
    stray = root / "shards/00000000-000001-000000000000.tar"
    stray.write_bytes(b"the upload of a writer that came second")
    assert find(root).unreferenced == ["shards/00000000-000001-000000000000.tar"]
    verify_shards(VerifyShardsConfig(root=str(root), gc=True))
    assert stray.exists()  # younger than a day: somebody may be about to commit it

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(UTC) + timedelta(days=1, minutes=1)

    monkeypatch.setattr(module, "datetime", Tomorrow)
    before = files(root)
    verify_shards(VerifyShardsConfig(root=str(root), gc=True))
    assert before.keys() - files(root).keys() == {"shards/00000000-000001-000000000000.tar"}


def test_garbage_of_an_unfinished_dataset_is_left_alone(root):
    (root / "SEALED.json").unlink()
    with pytest.raises(UserError, match="not sealed"):
        verify_shards(VerifyShardsConfig(root=str(root), gc=True))


def test_deep_runs_the_teacher_again(root, capsys):
    verify_shards(VerifyShardsConfig(root=str(root), deep=7))
    assert "teacher run again on 7 samples" in capsys.readouterr().out


def test_deep_finds_a_dataset_that_is_consistent_and_wrong(root):
    # Pairs of another sampler: every hash agrees, yet the spec does not describe them.
    entries = members(root)
    x0 = [data for name, data in entries if "x0" in name]
    forged = iter(x0[1:] + x0[:1])
    recommit(root, tar=tar_of([(name, next(forged) if "x0" in name else data) for name, data in entries]))
    (root / "SEALED.json").unlink()
    assert find(root).damaged == {}
    with pytest.raises(RunStopped, match="problems"):
        verify_shards(VerifyShardsConfig(root=str(root), deep=40))


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run.json, so not a pair dataset"):
        verify_shards(VerifyShardsConfig(root=str(tmp_path)))
