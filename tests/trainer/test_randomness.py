"""Derived randomness."""

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.randomness import DerivedDraws

CPU = torch.device("cpu")


def derived(samples, seed=0, purpose="noise", step=3, turn=1):
    return DerivedDraws(CPU, seed=seed, purpose=purpose, step=step, turn=turn, samples=samples)


def normal(samples, *key):
    return derived(samples, *key).normal(torch.Size((len(samples), 4)))


def test_the_same_key_draws_the_same_and_every_part_of_it_counts():
    assert torch.equal(normal([2]), normal([2]))
    keys = product((0, 1), ("noise", "critic"), (0, 1, 11), (0, 1))
    draws = {tuple(row.tolist()) for key in keys for row in normal([0, 1, 11], *key)}
    assert len(draws) == 2 * 2 * 3 * 2 * 3


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12, unique=True), st.data())
def test_a_sample_draws_the_same_in_any_company(samples, data):
    some = data.draw(st.lists(st.sampled_from(samples), min_size=1, unique=True))
    both = []
    for group in (samples, some):
        draws = derived(group)
        numbers = draws.integers(0, 999, len(group))
        noise = draws.normal(torch.Size((len(group), 3)))
        both.append({sample: (numbers[i].item(), noise[i].tolist()) for i, sample in enumerate(group)})
    assert all(both[0][sample] == both[1][sample] for sample in some)


def test_numbers_are_uniform_and_noise_is_normal():
    count = 20_000
    draws = derived(range(count))
    numbers = draws.integers(20, 29, count)
    noise = draws.normal(torch.Size((count,)))
    shares = torch.bincount(numbers, minlength=30)[20:] / count
    assert numbers.min() == 20
    assert numbers.max() == 29
    assert (shares - 0.1).abs().max() < 5 * (0.09 / count) ** 0.5
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.std() - 1) < 5 / (2 * count) ** 0.5


def test_a_known_answer():
    # What a run drew yesterday it must draw today: a resumed run goes on with these.
    assert derived([3], 7, "noise", 5, 0)._generators[0].initial_seed() == 1976444743142275906


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    normal([0])
    assert torch.equal(torch.get_rng_state(), before)
