"""The average of weights has a closed form, and forgets nothing when a run goes on."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_networks import SmallNetwork
from torch.nn.parallel import DataParallel

from trainer.ema import StudentEma


def moved(network, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), decay=st.sampled_from([0.3, 0.9, 0.9995]), num_steps=st.integers(0, 6))
def test_the_average_is_the_closed_form(seed, decay, num_steps):
    network = SmallNetwork(seed)
    ema = StudentEma(network, decay)
    history = [[parameter.detach().double() for parameter in network.parameters()]]
    for step in range(num_steps):
        moved(network, step)
        ema.update(network)
        history.append([parameter.detach().double() for parameter in network.parameters()])
    n = num_steps
    weights = [decay**n, *((1 - decay) * decay ** (n - i) for i in range(1, n + 1))]
    for number, parameter in enumerate(ema.module.parameters()):
        expected = sum(weight * then[number] for weight, then in zip(weights, history, strict=True))
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)
        assert parameter.dtype == torch.float32


def test_an_average_that_is_loaded_goes_on_as_if_it_had_not_stopped():
    network = SmallNetwork(0)
    straight = StudentEma(network, 0.9)
    for step in range(3):
        moved(network, step)
        straight.update(network)
    resumed = StudentEma(network, 0.9)
    resumed.module.load_state_dict(straight.module.state_dict())
    for step in range(3, 5):
        moved(network, step)
        straight.update(network)
        resumed.update(network)
    assert not torch.equal(resumed.module.scale, network.scale)
    for a, b in zip(straight.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_is_a_network_of_its_own():
    network = SmallNetwork(0)
    ema = StudentEma(network, 0.9)
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    before = {name: tensor.clone() for name, tensor in ema.module.state_dict().items()}
    moved(network, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.module.state_dict().items())
    network.shift.add_(1)
    ema.update(network)
    assert torch.equal(ema.module.shift, network.shift)  # buffers are not averaged
    assert ema.module.state_dict().keys() == network.state_dict().keys()


def test_a_wrapper_around_the_student_makes_no_difference():
    network = SmallNetwork(0)
    plain, wrapped = StudentEma(network, 0.9), StudentEma(network, 0.9)
    moved(network, 0)
    plain.update(network)
    wrapped.update(DataParallel(network))
    for a, b in zip(plain.module.parameters(), wrapped.module.parameters(), strict=True):
        assert torch.equal(a, b)
