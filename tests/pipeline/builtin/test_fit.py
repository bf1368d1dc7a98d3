"""Training is a function of its config: stopped anywhere and started again it ends in the same bits."""

import math

import pytest
import torch
from torch import nn

from configs.builtin_schema import FitConfig
from configs.errors import RunStopped, UserError
from pipeline.builtin.fit import fit
from pipeline.builtin.randomness import generator

CONFIG = FitConfig(steps=23, batch_size=8, learning_rate=0.05, warmup_steps=3)


def model():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        for number, weight in enumerate(module.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator(0, "weights", number)))
    return module


def loss_of(module, *, killed_at=None):
    def loss(step):
        if step == killed_at:
            raise KeyboardInterrupt
        x = torch.randn(CONFIG.batch_size, 3, generator=generator(0, "batch", step))
        return (module(x)[:, 0] - x.sum(1)).square().mean()

    return loss


@pytest.mark.parametrize("kills", [[1], [5], [7, 13], [22], [4, 5, 6]])
def test_killed_and_started_again_equals_straight(tmp_path, kills):
    straight = model()
    fit(straight, loss_of(straight), CONFIG, tmp_path / "straight.pt", 5)
    for killed_at in kills:
        resumed = model()
        with pytest.raises(KeyboardInterrupt):
            fit(resumed, loss_of(resumed, killed_at=killed_at), CONFIG, tmp_path / "resumed.pt", 5)
    resumed = model()
    fit(resumed, loss_of(resumed), CONFIG, tmp_path / "resumed.pt", 5)
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_finished_training_computes_nothing(tmp_path):
    first, second = model(), model()
    fit(first, loss_of(first), CONFIG, tmp_path / "a.pt", 5)
    fit(second, loss_of(second, killed_at=0), CONFIG, tmp_path / "a.pt", 5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_result_is_the_average_by_the_formula(tmp_path):
    module, seen = model(), []
    average = [weight.detach().clone().double() for weight in module.parameters()]
    loss = loss_of(module)

    def watched(step):
        seen.append([weight.detach().clone().double() for weight in module.parameters()])
        return loss(step)

    fit(module, watched, CONFIG, tmp_path / "a.pt", 100)
    last = torch.load(tmp_path / "a.pt", weights_only=True)["module"]
    after_each_step = [*seen[1:], [weight.double() for weight in last.values()]]
    for step, weights in enumerate(after_each_step):
        decay = min(0.999, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for expected, weight in zip(average, module.parameters(), strict=True):
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert not module.training


def test_the_learning_rate_warms_up_and_falls_to_nothing(tmp_path):
    """With AdamW and a constant gradient a step is the learning rate, up to weight decay."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    config = FitConfig(steps=40, batch_size=1, learning_rate=1e-3, warmup_steps=4)
    places = []

    def loss(step):
        places.append(module.weight.item())
        return -module.weight.sum()

    fit(module, loss, config, tmp_path / "a.pt", 100)
    for step in range(39):
        expected = 1e-3 * min((step + 1) / 5, 1) * 0.5 * (1 + math.cos(math.pi * step / 40))
        assert places[step + 1] - places[step] == pytest.approx(expected, rel=1e-2)


def test_what_cannot_be_gone_on_from_is_refused(tmp_path):
    module = model()
    fit(module, loss_of(module), CONFIG, tmp_path / "a.pt", 5)
    for steps in (10, 30):
        with pytest.raises(UserError, match=f"other settings .steps was 23, is {steps}"):
            fit(module, loss_of(module), CONFIG.model_copy(update={"steps": steps}), tmp_path / "a.pt", 5)
    with pytest.raises(UserError, match="seed"):
        fit(module, loss_of(module), CONFIG, tmp_path / "a.pt", 5, {"seed": 1})
    other = nn.Linear(3, 4)
    with pytest.raises(UserError, match="another network"):
        fit(other, loss_of(other), CONFIG, tmp_path / "a.pt", 5)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    module = model()
    loss = loss_of(module)
    with pytest.raises(RunStopped, match="step 7"):
        fit(module, lambda step: loss(step) * (math.nan if step == 7 else 1), CONFIG, tmp_path / "a.pt", 5)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 5


def test_running_statistics_come_along(tmp_path):
    """Batch normalisation keeps averages that are no parameters; with a network's first ones it would see nothing."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    seen = []

    def loss(step):
        value = loss_of(module)(step)
        seen.append({name: buffer.clone() for name, buffer in module[1].named_buffers()})
        return value

    fit(module, loss, CONFIG, tmp_path / "a.pt", 5)
    assert int(module[1].num_batches_tracked) == CONFIG.steps
    for name, buffer in module[1].named_buffers():
        assert torch.equal(buffer, seen[-1][name]), name
