"""Means are means, over whatever was added, however it was cut; and adding reads nothing."""

import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.tracking.means import Means


class TwoProcesses:
    """An accelerator whose other process has added the same."""

    @staticmethod
    def reduce(tensor, reduction):
        assert reduction == "sum"
        return 2 * tensor


@pytest.fixture
def one():
    return Accelerator(cpu=True)


numbers = st.floats(-1e3, 1e3, width=32)


@given(st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=1, max_size=6))
def test_a_mean_is_over_all_samples_however_they_came(batches):
    means = Means(torch.device("cpu"))
    for batch in batches:
        values = torch.tensor(batch)
        means.add("by sample", values)
        means.add("by batch", values.double().mean(), len(batch))
        means.add("root", values.square().double(), root=True)
        means.add_total("total", values.double())
    flat = [value for batch in batches for value in batch]
    for accelerator, processes in ((Accelerator(cpu=True), 1), (TwoProcesses, 2)):
        taken = means.take(accelerator)
        mean, rms = math.fsum(flat) / len(flat), math.hypot(*flat) / math.sqrt(len(flat))
        close = {"rel": 1e-6, "abs": 1e-6}
        assert taken["by sample"] == pytest.approx(mean, **close)
        assert taken["by batch"] == pytest.approx(mean, **close)
        assert taken["root"] == pytest.approx(rms, **close)
        assert taken["total"] == pytest.approx(processes * math.fsum(flat), **close)
        assert means.take(accelerator) == {}  # they start anew
        for value in flat:
            means.add("by sample", value)
            means.add("by batch", value)
            means.add("root", torch.tensor(value).double().square(), root=True)
            means.add_total("total", value)


def test_counts_weigh(one):
    means = Means(torch.device("cpu"))
    means.add("x", torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3, 1, 0]))
    means.add("x", 7.0, 0.5)
    assert means.take(one) == {"x": (3 + 2 + 3.5) / 4.5}


def test_a_mean_of_nothing_is_absent_and_what_does_not_count_may_be_anything(one):
    means = Means(torch.device("cpu"))
    means.add("empty", torch.tensor([]))
    means.add("uncounted", torch.tensor(math.nan), 0)
    means.add("masked", torch.tensor([1.0, math.nan, math.inf]), torch.tensor([True, False, False]))
    means.add("nan", torch.tensor([1.0, math.nan]))
    means.add_total("none", torch.tensor(0))
    taken = means.take(one)
    assert taken.keys() == {"masked", "nan", "none"}
    assert (taken["masked"], taken["none"]) == (1.0, 0.0)
    assert math.isnan(taken["nan"])


def test_bins(one):
    means = Means(torch.device("cpu"))
    means.add_binned("cosine", torch.tensor([1.0, 2.0, math.nan, 4.0]), torch.tensor([0, 2, 3, 2]), 4)
    means.add_binned("cosine", torch.tensor([5.0]), torch.tensor([0.0]), 4)
    taken = means.take(one)
    assert list(taken) == ["cosine/bucket0", "cosine/bucket2", "cosine/bucket3"]
    assert (taken["cosine/bucket0"], taken["cosine/bucket2"]) == (3.0, 3.0)
    assert math.isnan(taken["cosine/bucket3"])


def test_nothing_is_lost_to_low_precision(one):
    means = Means(torch.device("cpu"))
    means.add("x", torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16))
    for number in (2.0**24, 1.0):
        means.add_total("total", torch.tensor(number))
    assert means.take(one) == {"x": 86.0, "total": 2.0**24 + 1}


class OnMeta(TorchDispatchMode):
    """No operation takes a tensor of another device: none is copied to or from it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), function
        return function(*args, **(kwargs or {}))


def test_adding_does_not_wait_for_the_device():
    # Tensors on the meta device have no content: to read one is an error, as it would be a wait on a GPU.
    means, device = Means(torch.device("meta")), torch.device("meta")
    three = torch.ones(3, device=device)
    with OnMeta():
        for _ in range(2):
            means.add("x", three, three, root=True)
            means.add("lr", 0.1)
            means.add_binned("bins", three, three, 4)
            means.add_total("total", three)
    with pytest.raises(NotImplementedError, match=r"[mM]eta"):
        means.take(TwoProcesses)


def test_a_graph_is_not_kept():
    means, weight = Means(torch.device("cpu")), torch.ones(3, requires_grad=True)
    means.add("x", weight * 2)
    means.add_binned("bins", weight * 2, torch.arange(3), 3)
    means.add_total("total", weight * 2)
    assert not any(tensor.requires_grad for tensor in [*means._sums.values(), *means._totals.values()])
