"""One network and its optimizer."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from configs.train_schema import OptimizerConfig
from trainer.trainable import Trainable


def linear(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(3, 2)


def batch(seed, count=8):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def turn(trainable, x, parts, step=0):
    for number, part in enumerate(x.chunk(parts)):
        with trainable.accumulating(is_last=number == parts - 1):
            trainable.backward(trainable.prepared(part).square().mean() / parts)
    return trainable.update(step)


def test_accumulated_micro_batches_are_one_batch():
    whole, parts = (Trainable(Accelerator(cpu=True), linear(), OptimizerConfig(warmup_steps=0), 0.1) for _ in range(2))
    for step in range(3):
        norm, _ = turn(whole, batch(step), 1, step)
        norm_parts, _ = turn(parts, batch(step), 4, step)
        torch.testing.assert_close(norm, norm_parts)
    for a, b in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_update_is_that_of_adamw_on_the_clipped_gradient():
    config = OptimizerConfig(warmup_steps=4, max_grad_norm=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    trainable = Trainable(Accelerator(cpu=True), linear(), config, 0.1)
    reference = linear()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1.0, betas=(0.8, 0.9), weight_decay=0.1, fused=True)
    for step in range(6):
        norm, _ = turn(trainable, batch(step), 1, step)
        optimizer.zero_grad()
        reference(batch(step)).square().mean().backward()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
        optimizer.param_groups[0]["lr"] = 0.1 * min(1, (step + 1) / 4)
        optimizer.step()
        assert norm > 0.01  # the norm is that before clipping
        assert torch.equal(norm, expected)
        assert all(
            torch.equal(a, b) for a, b in zip(trainable.network.parameters(), reference.parameters(), strict=True)
        )


@pytest.mark.parametrize(("warmup", "rates"), [(0, [0.1, 0.1, 0.1]), (1, [0.1, 0.1, 0.1]), (4, [0.025, 0.05, 0.075])])
def test_the_learning_rate_rises_to_its_value_within_the_warmup(warmup, rates):
    trainable = Trainable(Accelerator(cpu=True), linear(), OptimizerConfig(warmup_steps=warmup), 0.1)
    assert [trainable.learning_rate(step) for step in range(3)] == pytest.approx(rates)
    assert trainable.learning_rate(1000) == 0.1


@pytest.mark.parametrize(("warmup", "rates"), [(0, [0.1, 0.075, 0.025, 0.0]), (3, [0.1 / 3, 0.05, 0.025, 0.0])])
def test_the_learning_rate_falls_to_zero_along_a_half_cosine(warmup, rates):
    trainable = Trainable(Accelerator(cpu=True), linear(), OptimizerConfig(warmup_steps=warmup), 0.1, decay_steps=3)
    assert [trainable.learning_rate(step) for step in range(4)] == pytest.approx(rates)
    assert trainable.learning_rate(1000) == pytest.approx(0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    trainable = Trainable(Accelerator(cpu=True), linear(), OptimizerConfig(), 0.1)
    turn(trainable, batch(0), 1)
    before = copy.deepcopy((trainable.network.state_dict(), trainable.optimizer.state_dict()["state"]))
    x = batch(1)
    x[3, 1] = bad
    assert not turn(trainable, x, 2)[1]
    after = (trainable.network.state_dict(), trainable.optimizer.state_dict()["state"])
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert all(torch.equal(before[1][i][name], after[1][i][name]) for i in before[1] for name in before[1][i])
    # and it is gone: the next turn is as if the bad one had not been
    twin = Trainable(Accelerator(cpu=True), linear(), OptimizerConfig(), 0.1)
    turn(twin, batch(0), 1)
    turn(trainable, batch(2), 1)
    turn(twin, batch(2), 1)
    assert torch.equal(trainable.network.weight, twin.network.weight)
