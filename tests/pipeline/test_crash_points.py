"""A process killed at any write to the storage: whatever lies there then, the same command finishes the dataset."""

import errno
import json
import re
from itertools import count

import pytest
from PIL import Image
from support.toy import files, shard_bytes, toy_config

from configs.errors import RunStopped
from pipeline import in_process_executor, lease, shard_maker
from pipeline.generate import generate_pairs
from pipeline.shards.dataset import Dataset
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify
from pipeline.shards.writer import ShardWriter

MUTATIONS = ("write", "upload", "create", "delete")
NUM_SAMPLES, PER_SHARD = 4, 2


class Killed(BaseException):
    """Not an Exception: no handler of the product may take it for an error to deal with."""


class Process:
    """This process in the role of one that dies at the n-th change of a storage, and changes nothing from then on.

    Args:
        patch: undone by the caller when the process is over.
        dies_at: number of the change, from 1; 0 lives for ever.
        after: it dies when the change has been made, not before.

    Attributes:
        places: kind and path of every change asked for, the one it died at last; what a run's own name or clock
            decides is left out of the paths.
    """

    def __init__(self, patch, dies_at=0, *, after=False):
        self.places = []
        self.is_dead = False
        for name in MUTATIONS:
            patch.setattr(Storage, name, self._fatal(name, getattr(Storage, name), dies_at, after))
        # A dead process cleans nothing up ...
        leave = ShardWriter.__exit__

        def exit_writer(writer, *error):
            content = writer._path.read_bytes()
            leave(writer, *error)
            if self.is_dead:
                writer._path.write_bytes(content)

        patch.setattr(ShardWriter, "__exit__", exit_writer)
        # ... and whoever looks sees that it runs no more: it began at another time than this one.
        for module in (lease, shard_maker):
            patch.setattr(module, "process_identity", self._identity(module.process_identity))
        # One shard at a time, so that changes come in one order.
        patch.setattr(in_process_executor, "_SLOTS", 1)

    def _fatal(self, name, original, dies_at, after):
        def change(storage, path, *content):
            if self.is_dead:
                raise Killed
            self.places.append(f"{name} {re.sub(r'events/.*', 'events/', path)}")
            self.is_dead = len(self.places) == dies_at
            if self.is_dead and not after:
                raise Killed
            result = original(storage, path, *content)
            if self.is_dead:
                raise Killed
            return result

        return change

    def _identity(self, original):
        return lambda pid: "-".join([*original(pid).split("-")[:3], "0"])


def config_of(folder, **runtime):
    folder.mkdir(exist_ok=True)
    # A heartbeat is a write too, but a clock decides when: here none falls due.
    settings = {"temp_dir": str(folder / "temp"), "batch_size": 2, "lease_period_s": 3600, "max_errors_per_shard": 1}
    return toy_config(
        folder / "root",
        folder,
        spec={"pairs_per_prompt": 1, "num_samples": NUM_SAMPLES, "sampler": {"name": "ddim", "steps": 2}},
        layout={"samples_per_shard": PER_SHARD},
        runtime={**settings, **runtime},
    )


def content(root):
    """Everything that the spec decides; the rest says who did the work, and when."""
    kept = ("shards/", "index/", "previews/", "prompts.parquet", "contact_sheet.png")
    return {path: data for path, data in files(root).items() if path.startswith(kept)}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A dataset made undisturbed, and the changes to the storage that it took."""
    folder = tmp_path_factory.mktemp("truth")
    with pytest.MonkeyPatch.context() as patch:
        process = Process(patch)
        generate_pairs(config_of(folder))
    assert len(shard_bytes(folder / "root")) == NUM_SAMPLES // PER_SHARD
    return folder / "root", process.places


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_after_a_crash_at_any_write_the_same_command_finishes_the_dataset(truth, tmp_path, after):
    root, places = truth
    crashed_at = []
    for n in count(1):
        folder = tmp_path / f"{n}"
        with pytest.MonkeyPatch.context() as patch:
            process = Process(patch, dies_at=n, after=after)
            try:
                generate_pairs(config_of(folder))
            except Killed:
                crashed_at.append(process.places[-1])
            else:
                break
        commits = files(folder / "root/commits")
        generate_pairs(config_of(folder))
        where = f"after a crash {'after' if after else 'before'} {crashed_at[-1]}"
        assert content(folder / "root") == content(root), where
        assert commits.items() <= files(folder / "root/commits").items(), where
        if len(commits) < NUM_SAMPLES // PER_SHARD:  # it is a worker that clears away what a killed one has left
            assert list((folder / "temp").iterdir()) == [], where
        dataset = Dataset.open(Storage.open(str(folder / "root")))
        assert dataset.sealed["content_sha256"] in (folder / "root/README.md").read_text(), where
        findings = verify(dataset)
        assert (findings.problems, findings.missing, findings.unreferenced) == ([], [], []), where
        assert json.loads((folder / "root/report.json").read_bytes())["outcome"] == "complete", where
    assert crashed_at == places  # not one was left out


@pytest.mark.parametrize("level", [1, 9], ids=["same bytes", "other bytes"])
def test_an_upload_without_its_commit_is_a_file_that_nobody_names(truth, tmp_path, level):
    """The retry may find its own bytes there, or those of another library that packs the same picture otherwise."""
    root, _ = truth
    config = config_of(tmp_path)
    ours = Dataset(Storage.open(str(tmp_path / "root")), Dataset.open(Storage.open(str(root))).run)
    create, save = Storage.create, Image.Image.save

    def refuse(storage, path, data):
        if path.startswith("commits/"):
            raise OSError(errno.EIO, "server error")
        return create(storage, path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "create", refuse)
        patch.setattr(Image.Image, "save", lambda *args, **options: save(*args, **{**options, "compress_level": level}))
        with pytest.raises(RunStopped, match="2 of 2 shards are parked"):
            generate_pairs(config)
    assert (ours.committed(), ours.parked()) == (set(), {0, 1})
    assert ours.sealed is None
    findings = verify(ours)
    assert (findings.problems, findings.missing) == ([], [0, 1])
    nobody_names = findings.unreferenced
    assert nobody_names == [path for path in files(tmp_path / "root") if path.startswith(("index/", "shards/"))]
    assert len(nobody_names) == 4

    generate_pairs(config)
    assert shard_bytes(root).items() <= shard_bytes(tmp_path / "root").items()
    assert (ours.committed(), ours.parked()) == ({0, 1}, set())
    findings = verify(ours)
    assert (findings.problems, findings.missing) == ([], [])
    assert set(findings.unreferenced) == set(nobody_names) - files(root).keys()
    assert len(findings.unreferenced) == (0 if level == 1 else 2)
    assert ours.sealed is not None
