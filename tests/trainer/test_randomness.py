"""Derived randomness."""

from itertools import product

import torch

from trainer.randomness import derived_generator

CPU = torch.device("cpu")


def draw(*key):
    return torch.randn(4, generator=derived_generator(CPU, *key))


def test_the_same_key_draws_the_same_and_every_part_of_it_counts():
    assert torch.equal(draw(0, "noise", 3, 1, 2), draw(0, "noise", 3, 1, 2))
    draws = {tuple(draw(*key).tolist()) for key in product((0, 1), ("noise", "critic"), (0, 1, 11), (0, 1), (0, 1, 11))}
    assert len(draws) == 2 * 2 * 3 * 2 * 3


def test_a_known_answer():
    # What a run drew yesterday it must draw today: a resumed run goes on with these.
    assert derived_generator(CPU, 7, "noise", 5, 0, 3).initial_seed() == 1976444743142275906


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw(0, "noise", 0, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)
