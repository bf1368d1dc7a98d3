"""The matrix: every way in which a dataset can be damaged at rest, and who finds it, what is said, what is mended.

Of each: ``verify`` finds it and names the shard; the trainer's reader stops before a sample of that shard; a repair
withdraws what is broken and no more, and after it the same command has the very bytes that there were.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.forge import SHARD, flip, members, recommit, record, reindexed, rewrite, tar_of
from support.toy import toy_config

from configs.errors import RunStopped, UserError
from configs.schema import VerifyShardsConfig
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import verify_shards
from pipeline.shards.dataset import Dataset
from pipeline.shards.reader import PairReader
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify

BLOCK = 512
NUM_SHARDS = 4
SAID = "is damaged: .*its sha256 is not the one recorded"
"""Of a tar whose bytes are damaged."""


@dataclass(frozen=True)
class Damage:
    """A row of the matrix.

    Attributes:
        inflict: (root, root of another dataset) damages the former.
        finding: what ``verify`` says, a regular expression.
        shards: those that are damaged, each of which the finding and the reader must name.
        reader: what the reader says, after the name of the shard or the record; None: it does not need what is damaged.
    """

    inflict: Callable[[Path, Path], object]
    finding: str
    shards: tuple[int, ...] = ()
    reader: str | None = None


def tar(edit: Callable[[bytes], bytes]) -> Damage:
    """Damage to the bytes of a tar, which its sha256 gives away, whatever else it breaks."""
    return Damage(lambda root, other: rewrite(root, edit), SAID, (SHARD,), SAID)


def edit_record(root: Path, **changes: object) -> None:
    (root / f"commits/{SHARD:06d}.json").write_text(json.dumps(record(root) | changes))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def swap(root: Path, what: str) -> None:
    one, two = (root / record(root, shard)[what] for shard in (1, 2))
    one_bytes = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(one_bytes)


def leave_out_last_array(root: Path) -> None:
    """One member is missing from a tar, and record and index agree that all is well."""
    forged = tar_of(members(root)[:-1])
    recommit(root, tar=forged, index=reindexed(root, forged))


def copy(name: str) -> Callable[[Path, Path], object]:
    return lambda root, other: (shutil.rmtree(root / name), shutil.copytree(other / name, root / name))


MATRIX = {
    "a header byte is flipped": tar(lambda d: flip(d, 5 * BLOCK + 3)),
    "a header is zeroed": tar(lambda d: d[:BLOCK] + bytes(BLOCK) + d[2 * BLOCK :]),
    "cut within a header": tar(lambda d: d[: 10 * BLOCK + 100]),
    "cut at a member boundary": tar(lambda d: d[: (len(d) // 2) // BLOCK * BLOCK]),
    "cut within a payload": tar(lambda d: d[: 6 * BLOCK + 77]),
    "a payload byte is flipped": tar(lambda d: flip(d, 2 * BLOCK + 200)),
    "the last byte is flipped": tar(lambda d: flip(d, len(d) - 1)),
    "something is appended": tar(lambda d: d + bytes(BLOCK)),
    "empty": tar(lambda d: b""),
    "a tar is missing": Damage(lambda r, o: (r / record(r)["path"]).unlink(), "is missing", (SHARD,), "is missing"),
    "an array is missing": Damage(
        lambda r, o: leave_out_last_array(r), "member 0.*x0.npy is missing", (SHARD,), "content_sha256 of SEALED.json"
    ),
    "swapped tars": Damage(lambda r, o: swap(r, "path"), "sha256 is not", (1, 2), "sha256 is not"),
    "swapped indices": Damage(lambda r, o: swap(r, "index_path"), "sha256 is not", (1, 2), "sha256 is not"),
    "a stale index": Damage(
        lambda r, o: (r / record(r)["index_path"]).write_bytes((o / record(o)["index_path"]).read_bytes()),
        "index/.* is damaged: its sha256 is not",
        (SHARD,),
        "index/.* is damaged: its sha256 is not",
    ),
    "an index is missing": Damage(
        lambda r, o: (r / record(r)["index_path"]).unlink(), "index/.* is missing", (SHARD,), "index/.* is missing"
    ),
    "a record with another sha256": Damage(
        lambda r, o: edit_record(r, sha256="0" * 64), "sha256 is not", (SHARD,), "content_sha256 of SEALED.json"
    ),
    "a record that counts wrong": Damage(
        lambda r, o: edit_record(r, num_samples=7), "number of samples", (SHARD,), "does not count its samples right"
    ),
    "a record that leads out of the root": Damage(
        lambda r, o: edit_record(r, path="shards/../../../etc/passwd"), "not a commit record", (SHARD,), "not a commit"
    ),
    "a record of another dataset": Damage(
        lambda r, o: edit_record(r, fingerprint=record(o)["fingerprint"]), "belongs to dataset", (SHARD,), "belongs to"
    ),
    "the record of another shard": Damage(
        lambda r, o: (r / f"commits/{SHARD:06d}.json").write_text(json.dumps(record(r, 3))),
        "holds the commit record of shard 3",
        (SHARD,),
        "holds the commit record of shard 3",
    ),
    "a record that is no JSON": Damage(
        lambda r, o: (r / f"commits/{SHARD:06d}.json").write_text("{"), "not a commit record", (SHARD,), "not a commit"
    ),
    "a record is lost": Damage(
        lambda r, o: (r / f"commits/{SHARD:06d}.json").unlink(),
        "1 shards of a sealed dataset have no",
        (),
        "num_shards",
    ),
    "the manifest of another dataset": Damage(copy("manifest"), "manifest/shards.parquet: what it says of shard 0"),
    "the seal of another dataset": Damage(
        lambda r, o: shutil.copy(o / "SEALED.json", r / "SEALED.json"),
        r"SEALED.json: \w+ is not that of",
        (),
        "fingerpr",
    ),
    "a seal that is no JSON": Damage(
        lambda r, o: (r / "SEALED.json").write_text("{"), "SEALED.json: not JSON", (), "SEALED.json: not JSON"
    ),
    "a seal that promises a million tables": Damage(
        lambda r, o: edit_json(r / "SEALED.json", sample_tables=10**12),
        "SEALED.json: sample_tables is missing, or more",
    ),
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Config and root of a dataset, and the root of another one of the same form."""
    folder = tmp_path_factory.mktemp("damage")
    sections = {"spec": {"pairs_per_prompt": 4, "num_samples": 16}, "layout": {"samples_per_shard": 4}}
    config = toy_config(folder / "root", folder, **sections)
    generate_pairs(config)
    other = toy_config(folder / "other", folder, spec=sections["spec"] | {"seed": 8}, layout=sections["layout"])
    generate_pairs(other)
    return config, folder / "root", folder / "other"


@pytest.fixture
def root(datasets, tmp_path):
    return shutil.copytree(datasets[1], tmp_path / "root")


def read(root: Path) -> tuple[str, set[int]]:
    """How an epoch ends, and the shards of which something was read until then."""
    options = {"seed": 5, "window": 1, "holdout": 0, "selection": None, "cache_folder": root, "cache_bytes": 0}
    seen: set[int] = set()
    try:
        reader = PairReader(str(root), allow_partial=False, **options)
        for position in range(reader.num_samples):
            seen |= {int(key) // 4 for key in reader.read([position]).keys}
    except RunStopped as error:
        return str(error), seen
    return "", seen


def identities(root: Path, shards: set[int]) -> dict[str, object]:
    """Bytes, inode and time of every file of some shards."""
    paths = [root / f"commits/{shard:06d}.json" for shard in shards]
    paths += [root / record(root, shard)[what] for shard in shards for what in ("path", "index_path")]
    return {path.name: (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("damage", MATRIX.values(), ids=MATRIX)
def test_damage_is_found_and_named(datasets, root, damage):
    damage.inflict(root, datasets[2])

    findings = verify(Dataset.open(Storage.open(str(root))))
    assert tuple(findings.damaged) == damage.shards
    for problem in findings.problems:
        assert re.search(damage.finding, problem)
        assert "\n" not in problem
    for shard in damage.shards:
        assert f"shard {shard}" in findings.damaged[shard] or f"commits/{shard:06d}.json" in findings.damaged[shard]

    said, seen = read(root)
    if damage.reader is None:
        assert (said, seen) == ("", set(range(NUM_SHARDS)))
    else:
        assert re.search(damage.reader, said)
        assert "\n" not in said
        assert "verify_shards.py" in said
        assert "--repair" in said
        assert not seen & set(damage.shards)


MENDED = [row for row, damage in MATRIX.items() if damage.finding != SAID] + ["cut within a payload"]
"""What is done about a tar is the same for any damage to its bytes."""


@pytest.mark.parametrize("damage", [MATRIX[row] for row in MENDED], ids=MENDED)
def test_what_is_broken_is_made_again_and_nothing_else(datasets, root, damage):
    config, pristine, other = datasets
    damage.inflict(root, other)
    missing = set(range(NUM_SHARDS)) - {int(path.stem) for path in (root / "commits").iterdir()}
    whole = set(range(NUM_SHARDS)) - set(damage.shards) - missing
    before = identities(root, whole)
    verify_shards(VerifyShardsConfig(root=str(root), repair=True))
    assert {int(path.stem) for path in (root / "commits").iterdir()} == whole
    generate_pairs(config.model_copy(update={"output": str(root)}))
    assert identities(root, whole) == before
    everything = set(range(NUM_SHARDS))
    for what in ("path", "index_path", "sha256", "index_sha256", "num_samples", "rejected"):
        assert [record(root, k)[what] for k in everything] == [record(pristine, k)[what] for k in everything]
    for shard in everything:
        for what in ("path", "index_path"):
            name = record(root, shard)[what]
            assert (root / name).read_bytes() == (pristine / name).read_bytes()
    verify_shards(VerifyShardsConfig(root=str(root)))
    assert read(root) == ("", everything)


def test_a_tar_that_no_record_names_is_nobodys(datasets, root, capsys):
    """The tar of another dataset lies beside the shards: found, harmless, never read, and no repair touches it."""
    stray = root / record(datasets[2])["path"]
    shutil.copy(datasets[2] / record(datasets[2])["path"], stray)
    before = identities(root, set(range(NUM_SHARDS)))
    findings = verify(Dataset.open(Storage.open(str(root))))
    assert (findings.problems, findings.unreferenced) == ([], [f"shards/{stray.name}"])
    assert read(root) == ("", set(range(NUM_SHARDS)))
    verify_shards(VerifyShardsConfig(root=str(root), repair=True))
    assert "1 files are named by no commit record (harmless" in capsys.readouterr().out
    assert stray.exists()
    assert identities(root, set(range(NUM_SHARDS))) == before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda run: run | {"num_shards": 10**12}, "num_shards is 1000000000000, the samples make 4"),
        (lambda run: run | {"num_shards": 3}, "num_shards is 3, the samples make 4"),
        (lambda run: run | {"fingerprint": "0" * 64}, "the spec does not match its fingerprint"),
        (lambda run: run | {"spec": run["spec"] | {"seed": 8}}, "the spec does not match its fingerprint"),
        (
            lambda run: run | {"spec": run["spec"] | {"format_version": 2}},
            "format_version is 2, this code knows 1",
        ),
        (lambda run: [run], "run.json: "),
    ],
)
def test_a_damaged_identity_is_beyond_repair_and_stops_everybody(datasets, root, edit, message):
    path = root / "run.json"
    path.write_text(json.dumps(edit(json.loads(path.read_bytes()))))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    config = datasets[0].model_copy(update={"output": str(root)})
    for act in (
        lambda: verify_shards(VerifyShardsConfig(root=str(root), repair=True)),
        lambda: generate_pairs(config),
        lambda: PairReader(
            str(root),
            seed=0,
            window=1,
            holdout=0,
            selection=None,
            cache_folder=root,
            cache_bytes=0,
            allow_partial=True,
        ),
    ):
        with pytest.raises((RunStopped, UserError), match=message) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
