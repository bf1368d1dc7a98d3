"""What a run measures and draws between two steps, on pairs that it does not train on."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from support.training import metrics, train_config

from trainer import training_run
from trainer.build import build
from trainer.loop import train


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_held_out_pair_counts_once_however_many_processes_share_them(trained_on, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(training_run, "HELD_OUT_BATCH", 3)
    with build(train_config(trained_on, tmp_path / "run", data={"holdout": 7})) as run:
        held_out, generator = run.data.held_out, run.generator_of(run.student.network)
        with torch.no_grad():
            alone = [
                run.held_out_distance(generator(z[None].float(), run.conditions([prompt])), target[None])
                for z, prompt, target in zip(held_out.noise, held_out.prompts, held_out.target, strict=True)
            ]
        shares = []
        monkeypatch.setattr(run.metrics, "add", lambda name, value, *empty: None if empty else shares[-1].append(value))
        for index in range(processes):
            shares.append([])
            here = {"process_index": index, "num_processes": processes, "autocast": run.accelerator.autocast}
            monkeypatch.setattr(run, "accelerator", SimpleNamespace(**here))
            run._measure_held_out("distance", run.student.network)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert max(len(batch) for share in shares for batch in share) == min(3, max(sizes))
    torch.testing.assert_close(torch.cat([*chain(*shares)]).sort().values, torch.cat(alone).sort().values)


def test_without_held_out_pairs_the_grid_shows_others(trained_on, tmp_path):
    data, loss = {"holdout": 0}, {"dm_weight": 0.0}
    train(train_config(trained_on, tmp_path / "run", data=data, loss=loss, runtime={"steps": 1}))
    assert (tmp_path / "run" / "grids" / "step_0000001.png").exists()
    assert "holdout/distance" not in metrics(tmp_path / "run")[-1]
