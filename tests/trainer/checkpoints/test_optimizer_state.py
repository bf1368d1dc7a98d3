"""The state of AdamW goes through a file without losing a bit, and to its own parameters only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_networks import SmallNetwork, adamw, train
from torch import nn

from configs.errors import UserError
from trainer.checkpoints.optimizer_state import expected_tensors, load_state_tensors, state_tensors
from trainer.checkpoints.tensor_file import load_network, read_tensors, tensor_names, write_tensors


def save(folder, network, optimizer):
    write_tensors(folder / "network.safetensors", network.state_dict())
    write_tensors(folder / "optimizer.safetensors", state_tensors(optimizer, network))


def load(folder, network, optimizer):
    load_network(folder / "network.safetensors", network)
    path = folder / "optimizer.safetensors"
    load_state_tensors(optimizer, network, read_tensors(path, expected_tensors(tensor_names(path), network)))


@pytest.mark.parametrize("kind", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), before=st.integers(0, 4), after=st.integers(1, 4))
def test_going_on_equals_not_having_stopped(tmp_path_factory, kind, seed, before, after):
    folder = tmp_path_factory.mktemp("run")
    stopped, straight, resumed = SmallNetwork(seed), SmallNetwork(seed), SmallNetwork(seed + 1)
    optimizers = [adamw(network, **kind) for network in (stopped, straight, resumed)]
    train(straight, optimizers[1], range(before + after))
    train(stopped, optimizers[0], range(before))
    save(folder, stopped, optimizers[0])
    train(resumed, optimizers[2], range(7))  # whatever it was: it is forgotten
    load(folder, resumed, optimizers[2])
    for path in folder.iterdir():  # what has been loaded no longer depends on the file
        path.write_bytes(bytes(path.stat().st_size))
    train(resumed, optimizers[2], range(before, before + after))
    assert state_tensors(optimizers[1], straight).keys() == state_tensors(optimizers[2], resumed).keys()
    for name, tensor in [*straight.state_dict().items(), *state_tensors(optimizers[1], straight).items()]:
        assert torch.equal(tensor, (resumed.state_dict() | state_tensors(optimizers[2], resumed))[name]), name


def test_every_tensor_has_the_name_of_its_parameter(tmp_path):
    network = SmallNetwork(0)
    optimizer = adamw(network)
    train(network, optimizer, range(3))
    save(tmp_path, network, optimizer)
    names = {"inner.weight": (3, 3), "inner.bias": (3,), "scale": ()}  # unused has had no gradient
    tensors = state_tensors(optimizer, network)
    assert tensor_names(tmp_path / "optimizer.safetensors") == tensors.keys()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{name}.{key}": () if key == "step" else shape
        for name, shape in names.items()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    assert tensors["scale.exp_avg"] is optimizer.state[network.scale]["exp_avg"]
    assert tensors["scale.step"].item() == 3


def test_hyperparameters_are_those_of_the_optimizer(tmp_path):
    network = SmallNetwork(0)
    optimizer = adamw(network)
    train(network, optimizer, range(2))
    save(tmp_path, network, optimizer)
    other = torch.optim.AdamW(network.parameters(), lr=0.5, weight_decay=0.0)
    load(tmp_path, network, other)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.5, 0.0)


class Wider(SmallNetwork):
    def __init__(self, seed):
        super().__init__(seed)
        self.inner = nn.Linear(4, 3)


class Deeper(SmallNetwork):
    def __init__(self, seed):
        super().__init__(seed)
        self.outer = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (SmallNetwork(0), Wider(0), "inner.weight is 3x3 float32, not 3x4 float32"),
        (SmallNetwork(0), Deeper(0), "has no tensor outer.weight"),
        (Deeper(0), SmallNetwork(0), "outer.bias is not a tensor of this network"),
        (SmallNetwork(0).double(), SmallNetwork(0), "scale is a scalar float64, not a scalar float32"),
    ],
)
def test_the_weights_of_another_network_are_refused(tmp_path, there, here, message):
    write_tensors(tmp_path / "network.safetensors", there.state_dict())
    before = {name: tensor.clone() for name, tensor in here.state_dict().items()}
    with pytest.raises(UserError, match=f"network.safetensors.*{message}"):
        load_network(tmp_path / "network.safetensors", here)
    assert all(torch.equal(tensor, before[name]) for name, tensor in here.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale.exp_avg_sq": None}, "has no tensor scale.exp_avg_sq"),
        ({"scale.step": None}, "has no tensor scale.step"),
        ({"inner.bias.exp_avg": torch.zeros(4)}, "inner.bias.exp_avg is 4 float32, not 3 float32"),
        ({"inner.bias.step": torch.zeros(1)}, "inner.bias.step is 1 float32, not a scalar float32"),
        ({"outer.bias.step": torch.zeros(())}, "outer.bias.step is not a tensor of this network"),
    ],
    ids=str,
)
def test_the_state_of_another_optimizer_is_refused(tmp_path, change, message):
    network = SmallNetwork(0)
    optimizer = adamw(network)
    train(network, optimizer, range(2))
    save(tmp_path, network, optimizer)
    tensors = {**state_tensors(optimizer, network), **change}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_tensors(tmp_path / "optimizer.safetensors", tensors)
    with pytest.raises(UserError, match=message):
        load(tmp_path, network, optimizer)


def test_a_missing_file_is_named(tmp_path):
    for call in (lambda path: load_network(path, SmallNetwork(0)), tensor_names):
        with pytest.raises(UserError, match=r"fake_score\.safetensors: missing"):
            call(tmp_path / "fake_score.safetensors")
