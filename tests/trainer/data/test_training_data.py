"""The data of a run: the same stream for any workers and world, from any step, and a clear end when it is damaged."""

import json
import os
import pickle
import re
import shutil
import signal
import time
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from support.forge import flip, rewrite
from support.latents import write_latents

from configs.errors import RunStopped, UserError
from configs.schema import PromptsConfig
from configs.train_schema import TrainConfig
from pipeline import prompts as prompt_tables
from pipeline.prompts import PromptTable, prepare_prompts
from pipeline.shards.records import DamagedRecord
from pipeline.shards.row_groups import RowGroups
from pipeline.shards.selection import write_selection
from pipeline.shards.storage import Storage
from pipeline.shards.writer import DamagedShard
from trainer.data import loader, waiting
from trainer.data.loader import MicroBatchLoader
from trainer.data.pair_stream import PairStream
from trainer.data.positions import Positions
from trainer.data.prompt_stream import PromptReader
from trainer.data.training_data import TrainingData


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_latents(folder / "a", folder, num_samples=48, samples_per_shard=6)
    write_latents(folder / "b", folder, num_samples=20, samples_per_shard=6, seed=1)
    return folder


@pytest.fixture
def root(pristine, tmp_path):
    shutil.copytree(pristine / "a", tmp_path / "a")
    return tmp_path / "a"


def run(root=None, *, mix=(), data=None, loss=None, batch=None, runtime=None, seed=3):
    return TrainConfig.model_validate(
        {
            "output": "out",
            "teacher": {"kind": "mixture"},
            "data": {
                "pairs": str(root) if root else None,
                "mix": mix,
                "holdout": 4,
                "shuffle_window": 2,
                **(data or {}),
            },
            "loss": {"critic_steps_per_generator_step": 2, **(loss or {})},
            "batch": {"dm": 8, "regression": 4, **(batch or {})},
            "runtime": {"micro_batch": 2, "workers": 0, "prefetch": 2, **(runtime or {})},
            "seed": seed,
        }
    )


def stream(config, count, *, rank=0, world=1, first_step=0):
    with closing(MicroBatchLoader(TrainingData(config), rank=rank, world=world, first_step=first_step)) as batches:
        return list(islice(batches, count))


def say(batch):
    """A micro-batch as plain values."""
    pairs = batch.pairs and (batch.pairs.keys, batch.pairs.prompts, batch.pairs.noise.tolist())
    return batch.prompts, pairs


# ------------------------------------------------------------------------------------------------------------- stream


def test_every_pair_and_every_prompt_once_an_epoch_over_all_ranks(root):
    config = run(root)
    held_out = set(TrainingData(config).held_out.keys)
    # 44 pairs are 11 steps of 4; 24 prompts are 3 turns of 8, two turns a step: 11 steps are 7 epochs and 8 prompts.
    ranks = [stream(config, 44, rank=rank, world=2) for rank in range(2)]
    keys = [key for batches in ranks for batch in batches if batch.pairs for key in batch.pairs.keys]
    assert sorted([*keys, *held_out]) == [f"{i:09d}" for i in range(48)]
    prompts = [p for number in range(6) for batches in ranks for p in batches[number].prompts]
    assert sorted(prompts) == sorted(f"prompt {i}" for i in range(24))
    for batches in ranks:
        assert [batch.pairs is not None for batch in batches] == [True, True, False, False] * 11


def test_the_ranks_together_take_what_one_process_takes(root):
    config = run(root)
    one = [say(batch) for batch in stream(config, 24)]
    two = [stream(config, 12, rank=rank, world=2) for rank in range(2)]
    assert [say(batches[number]) for number in range(12) for batches in two] == one
    four = [stream(config, 6, rank=rank, world=4) for rank in range(4)]
    assert [say(batches[number]) for number in range(6) for batches in four] == one


def test_a_run_goes_on_from_any_step(root):
    config = run(root)
    whole = [say(batch) for batch in stream(config, 15 * 8)]
    for step in (1, 7, 11):
        assert [say(batch) for batch in stream(config, 16, first_step=step)] == whole[8 * step : 8 * step + 16]
    assert [say(batch) for batch in stream(run(root, seed=4), 16)] != whole[:16]


def test_a_worker_gets_little_and_opens_for_itself(root):
    positions = loader.MicroBatchPositions(run(root), 0, 1)
    dataset = loader._MicroBatches(TrainingData(run(root)), positions)
    sent = pickle.dumps(dataset)
    assert len(sent) < 10_000
    assert say(pickle.loads(sent)[3]) == say(dataset[3])
    (root / "SEALED.json").unlink()
    (root / "commits/000007.json").unlink()
    dataset = pickle.loads(sent)
    dataset._config = run(root, data={"allow_partial": True})
    assert "the data has changed since this run began" in str(dataset[0])


def test_datasets_are_mixed_by_weight(pristine):
    mix = [{"pairs": str(pristine / "a"), "weight": 3}, {"pairs": str(pristine / "b")}]
    batch = {"dm": 2, "regression": 100}
    config = run(mix=mix, batch=batch, loss={"critic_steps_per_generator_step": 1})
    data = TrainingData(config)
    assert data.num_pairs == 44 + 16
    assert [root for root, _ in data.datasets] == [str(pristine / "a"), str(pristine / "b")]
    assert data.held_out.keys == [
        *("000000006", "000000018", "000000030", "000000042"),
        *("000000002", "000000007", "000000012", "000000017"),
    ]
    pairs = [batch.pairs for batch in stream(config, 10)]
    noises = torch.cat([batch.noise for batch in pairs])
    keys = [key for batch in pairs for key in batch.keys]
    single = {name: TrainingData(run(pristine / name))._pairs.readers[0].read(range(750)) for name in "ab"}
    source = [
        "b" if torch.equal(z, by_key["b"].get(key, z + 1)) else "a"
        for by_key in [{n: dict(zip(b.keys, b.noise, strict=True)) for n, b in single.items()}]
        for key, z in zip(keys, noises, strict=True)
    ]
    assert source.count("a") == 750
    for name, count in (("a", 750), ("b", 250)):  # each goes through its own epochs, in its own order
        assert [key for key, at in zip(keys, source, strict=True) if at == name] == single[name].keys[:count]
    one_by_one = [data._pairs.read([position]) for position in range(20)]
    assert [(pair.keys[0], pair.prompts[0]) for pair in one_by_one] == list(
        zip(keys[:20], pairs[0].prompts[:20], strict=True)
    )
    for name in ("noise", "target"):
        assert torch.equal(torch.cat([getattr(pair, name) for pair in one_by_one]), getattr(pairs[0], name)[:20])
    taken = {name: source[:600].count(name) for name in "ab"}
    cursor = data.cursor(6)["pairs"]
    assert cursor["position"] == 600
    assert [(d["epoch"], d["position_in_epoch"]) for d in cursor["datasets"]] == [
        divmod(taken["a"], 44),
        divmod(taken["b"], 16),
    ]
    weights = [(identity.weight, identity.selection_digest) for identity in data.identities]
    assert weights == [(3.0, None), (1.0, None)]
    assert data.prompts_digest != TrainingData(run(mix=[mix[0], {**mix[1], "weight": 2}], batch=batch)).prompts_digest


# ------------------------------------------------------------------------------------------------------------ prompts


def test_prompts_of_a_table_in_windows_of_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_tables, "_ROW_GROUP", 5)
    (tmp_path / "p.txt").write_text("\n".join(f"text {i}" for i in range(120)))
    prepare_prompts(PromptsConfig(path=str(tmp_path / "p.txt")), tmp_path / "p.parquet")
    read = []
    original = RowGroups.group

    def spy(self, group):
        read.append(group)
        return original(self, group)

    monkeypatch.setattr(RowGroups, "group", spy)
    config = run(data={"prompts": str(tmp_path / "p.parquet")}, loss={"regression_weight": 0})
    data = TrainingData(config)
    assert (data.identities, data.target, data.held_out, data.num_pairs, data.datasets) == ((), None, None, 0, [])
    texts = [text for first in range(0, 120, 3) for text in data._prompts.read(range(first, first + 3))]
    assert sorted(texts) == sorted(f"text {i}" for i in range(120))
    assert len(read) <= 24 + 8  # each row group once, and the first window of the next epoch
    rows = [int(text.split()[1]) for text in texts]
    assert len({row // 5 for row in rows[:40]}) == 8  # shuffled over a window, not over a row group
    assert rows != sorted(rows)


def test_some_rows_of_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_tables, "_ROW_GROUP", 5)
    (tmp_path / "p.txt").write_text("\n".join(f"text {i}" for i in range(40)))
    prepare_prompts(PromptsConfig(path=str(tmp_path / "p.txt")), tmp_path / "p.parquet")

    def reader(rows):
        return PromptReader(PromptTable.open(Storage.open(str(tmp_path)), "p.parquet"), rows, 0)

    some = np.array([0, 4, 5, 17, 39])
    assert sorted(reader(some).read(range(5, 10))) == sorted(f"text {i}" for i in some)
    assert sorted(reader(range(13)).read(range(13))) == sorted(f"text {i}" for i in range(13))
    digests = [reader(rows).digest for rows in (None, range(40), range(13), some, some[:4])]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_prompts_of_selected_pairs(root, tmp_path):
    fingerprint = json.loads((root / "run.json").read_bytes())["fingerprint"]
    ids = np.array([0, 5, 10, 11, 12, 40])
    write_selection(str(tmp_path / "s.parquet"), ids, fingerprint=fingerprint, query="")
    config = run(root, data={"selection": str(tmp_path / "s.parquet"), "holdout": 1}, batch={"dm": 10, "regression": 5})
    data = TrainingData(config)
    (batch,) = stream(config.model_copy(update={"runtime": config.runtime.model_copy(update={"micro_batch": 10})}), 1)
    assert sorted([*batch.pairs.keys, *data.held_out.keys]) == [f"{i:09d}" for i in ids]
    assert sorted(batch.prompts) == sorted([f"prompt {i}" for i in (0, 2, 5, 6, 20)] * 2)
    assert data.identities[0].selection_digest is not None
    assert data.prompts_digest != TrainingData(run(root)).prompts_digest


# ------------------------------------------------------------------------------------------------------------- errors


def test_mistakes_are_found_at_opening(root, tmp_path):
    def refusal(error=UserError, **changes):
        with pytest.raises(error) as caught:
            TrainingData(run(**changes))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "not a pair dataset" in refusal(root=tmp_path)
    assert "data.holdout: 48 pairs" in refusal(root=root, data={"holdout": 48})
    assert "no such file" in refusal(root=root, data={"prompts": str(tmp_path / "none.parquet")})
    write_latents(
        tmp_path / "images", tmp_path, num_samples=8, samples_per_shard=8, fields={"x0": "none", "image": "png"}
    )
    latent = {"regression": "l2", "regression_space": "latent"}
    line = refusal(root=tmp_path / "images", loss=latent)
    assert line.startswith("loss.regression_space: latent compares x0")
    assert TrainingData(run(tmp_path / "images")).target == "image"
    assert TrainingData(run(root, loss=latent)).target == "x0"
    mix = [{"pairs": str(root)}, {"pairs": str(tmp_path / "images")}]
    assert "mix datasets of one kind" in refusal(mix=mix)
    assert refusal(mix=[{**mix[0], "weight": 5000}, mix[0]]).startswith("data.mix: weight 1 of dataset 2 is less")
    shutil.copy(tmp_path / "images/prompts.parquet", root / "prompts.parquet")
    assert "is not the prompt table of this dataset" in refusal(RunStopped, root=root)


def test_damage_reaches_the_main_process_as_the_same_line(root):
    rewrite(root, lambda data: flip(data, 700), shard=2)
    for workers in (0, 1):
        batches = MicroBatchLoader(TrainingData(run(root, runtime={"workers": workers})), rank=0, world=1, first_step=0)
        seen = []
        with closing(batches), pytest.raises(DamagedShard) as caught:
            seen.extend(int(key) // 6 for batch in batches if batch.pairs for key in batch.pairs.keys)
        assert 2 not in seen
        text = str(caught.value)
        assert text.startswith("shard 2: shards/")
        assert text.endswith(
            f"run `python stages/verify_shards.py {root} --repair`, then generate_pairs.py again, to have it made anew"
        )
    record = root / "commits/000003.json"
    record.write_text(record.read_text().replace('"attempt"', '"other"'))
    with pytest.raises(DamagedRecord, match=r"commits/000003.json: not a commit record.*--repair"):
        TrainingData(run(root))


def test_a_storage_that_fails_is_a_line_too(root, monkeypatch):
    data = TrainingData(run(root))

    def fail(*_):
        raise OSError(5, "Input/output error", "s3://bucket/shards/x.tar")

    monkeypatch.setattr(PairStream, "read", fail)
    monkeypatch.setattr(PairStream, "held_out", fail)
    line = r"^data cannot be read \(\[Errno 5\].*x.tar'\); the same"
    batches = MicroBatchLoader(data, rank=0, world=1, first_step=0)
    with closing(batches), pytest.raises(RunStopped, match=line):
        next(batches)
    with pytest.raises(RunStopped, match=line):  # as the sample grid reads, in the training process itself
        data.read(Positions(0, range(2), range(0)))
    with pytest.raises(RunStopped, match=line):
        _ = data.held_out
    dataset = pickle.loads(pickle.dumps(loader._MicroBatches(data, loader.MicroBatchPositions(run(root), 0, 1))))
    monkeypatch.setattr(PairStream, "__init__", fail)
    with pytest.raises(RunStopped, match=line):  # as a run opens its data, before its directory is made
        TrainingData(run(root))
    assert re.match(line, str(dataset[0]))


def test_workers_give_the_same_stream_until_one_is_killed(root):
    alone = [say(batch) for batch in stream(run(root), 9, first_step=5)]
    data = TrainingData(run(root, runtime={"workers": 2}))
    with closing(MicroBatchLoader(data, rank=0, world=1, first_step=5)) as batches:
        assert say(next(batches)) == alone[0]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # as a scheduler sends them to all processes
            for worker in batches._workers:
                os.kill(worker.pid, number)
        assert [say(batch) for batch in islice(batches, 8)] == alone[1:]
        victim, *_ = batches._workers
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        time.sleep(0.1)  # nothing is raised here
        with pytest.raises(RunStopped, match=r"^a data worker was ended by SIGKILL \(is memory short\?"):
            list(islice(batches, 20))
    assert not any(worker.is_alive() for worker in batches._workers)


def test_whoever_waits_long_is_told(capsys):
    notice = waiting.WaitingNotice(period_s=0.04)
    with notice.waiting_for("data of step 7"):
        while (said := capsys.readouterr().err).count("\n") == 0:
            time.sleep(0.01)
        while (again := capsys.readouterr().err).count("\n") == 0:
            time.sleep(0.01)
    assert said.startswith("still waiting for data of step 7, for 0 s now\n")
    assert again.startswith("still waiting for data of step 7")
    notice.close()


def test_cursor(root):
    config = run(root)
    data = TrainingData(config)
    cursor = data.cursor(13)
    assert json.loads(json.dumps(cursor)) == cursor
    assert (cursor["step"], cursor["seed"]) == (13, 3)
    (pairs,), (prompts,) = cursor["pairs"]["datasets"], cursor["prompts"]["tables"]
    assert (cursor["pairs"]["position"], pairs["epoch"], pairs["position_in_epoch"]) == (52, 1, 8)
    assert (cursor["prompts"]["position"], prompts["epoch"], prompts["position_in_epoch"]) == (208, 8, 16)
    assert pairs["content_sha256"] == json.loads((root / "SEALED.json").read_bytes())["content_sha256"]
    assert (
        prompts["digest"]
        == data.prompts_digest
        == json.loads((root / "run.json").read_bytes())["spec"]["prompts_digest"]
    )
