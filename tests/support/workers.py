"""Workers without a teacher, for tests of executors. Imported as ``tests.support.workers``, which actors can do too."""

import os
import time
from pathlib import Path

from pipeline.shard_maker import ShardResult
from pipeline.shards.records import Commit, Timing
from tests.support.patience import PATIENCE_S


def nothing(shard: int) -> ShardResult:
    """The result of a shard without samples."""
    timing = Timing(
        attempt=1, host="h", device="cpu", started="", sample_seconds=0, total_seconds=0, code_revision="", versions={}
    )
    commit = Commit(
        shard=shard, fingerprint="0" * 64, path=f"shards/{'0' * 8}-{shard:06d}-{'0' * 12}.tar", sha256="0" * 64,
        num_bytes=0, index_path=f"index/{shard:06d}-{'0' * 12}.parquet", index_sha256="0" * 64, num_samples=1,
        num_truncated=0, rejected=[], timing=timing,
    )  # fmt: skip
    return ShardResult(commit, adopted=False, device_seconds=0.0)


class IdleWorker:
    """Does nothing, successfully. Leaves its process number in a folder."""

    def __init__(self, folder: Path) -> None:
        (folder / str(os.getpid())).touch()

    def run(self, shard: int, attempt: int) -> ShardResult:
        """Succeed."""
        time.sleep(0.02)
        return nothing(shard)


class MeetingWorker(IdleWorker):
    """Makes nothing before three workers are there. Leaves its process number in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def run(self, shard: int, attempt: int) -> ShardResult:
        """Wait for the others, and succeed."""
        deadline = time.monotonic() + PATIENCE_S
        while len(list(self._folder.iterdir())) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        return super().run(shard, attempt)


class BrokenWorker(IdleWorker):
    """The first one of a folder fails at once, always, as on a broken device; the others work."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            (folder / "broken").mkdir()
            self._is_broken = True
        except FileExistsError:
            self._is_broken = False

    def run(self, shard: int, attempt: int) -> ShardResult:
        """Fail or succeed."""
        if self._is_broken:
            raise RuntimeError("device-side assert")
        return super().run(shard, attempt)


class NodeWithoutTeacher(IdleWorker):
    """Cannot be built, as where the teacher's folder is missing."""

    def __init__(self, folder: Path) -> None:
        raise RuntimeError(f"nothing at {folder}")
