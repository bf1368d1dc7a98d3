"""Processes that commit the same shards at the same moments, each with other bytes."""

import multiprocessing
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import pytest

from pipeline.shards.layout import IndexRow, key
from pipeline.shards.records import Timing
from pipeline.shards.storage import Storage
from pipeline.shards.writer import ShardWriter, commit_shard
from tests.support.patience import PATIENCE_S

TIMING = Timing(
    attempt=1, host="", device="", started="", sample_seconds=0, total_seconds=0, code_revision="", versions={}
)
ROW = IndexRow(
    key=key(0),
    shard=0,
    row=-1,
    offset=-1,
    length=0,
    prompt="p",
    status="ok",
    reason="",
    prompt_id="0" * 16,
    prompt_truncated=False,
    seed=0,
    noise_digest="0" * 16,
    guidance_scale=1.0,
    made_in_float32=False,
)


def race(root: str, scratch: Path, num_processes: int, num_shards: int) -> list[list[tuple[str, bool]]]:
    """Commit every shard from every process at once.

    Returns:
        For every shard and process: the sha256 of the record that it got, and whether that is its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.racing"])
    barrier, results = context.Barrier(num_processes), context.Queue()
    shared = (dict(os.environ), root, scratch, num_shards, barrier, results)
    processes = [
        context.Process(target=_commit_all, args=(number, *shared), daemon=True) for number in range(num_processes)
    ]
    for process in processes:
        process.start()
    said = []
    for _ in range(num_processes * num_shards):
        answer = results.get(timeout=PATIENCE_S)
        if isinstance(answer, str):
            pytest.fail(f"a process that commits: {answer}")
        said.append(answer)
    for process in processes:
        process.join(timeout=PATIENCE_S)
        assert process.exitcode == 0
    return [[(sha256, is_own) for at, sha256, is_own in said if at == shard] for shard in range(num_shards)]


def _commit_all(
    number: int,
    environment: dict[str, str],
    root: str,
    scratch: Path,
    num_shards: int,
    barrier: Barrier,
    results: Any,
) -> None:
    os.environ.update(environment)  # whoever forks may be older than the credentials
    try:
        storage = Storage.open(root)
        for shard in range(num_shards):
            with ShardWriter(scratch / f"{number}-{shard}.tar") as writer:
                writer.add(ROW, {"txt": str(number).encode() * 300})
                written = writer.finish()
                barrier.wait(timeout=PATIENCE_S)
                commit = commit_shard(storage, "0" * 64, shard, written, TIMING)
                results.put((shard, commit.sha256, commit.sha256 == written.sha256))
    except BrokenBarrierError:  # another process has said why
        raise
    except Exception as error:  # the others would wait for this process at the barrier
        results.put(f"{type(error).__name__}: {error}")
        barrier.abort()
        raise
