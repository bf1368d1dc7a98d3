"""Prompts to conditions."""

import torch

from trainer.conditions import Conditions


class Encoder:
    """A teacher whose encodings betray the batch they were made in, as rounding does."""

    def __init__(self):
        self.calls = []

    def encode_prompts(self, prompts):
        self.calls.append(list(prompts))
        return torch.tensor([[float(len(prompt)), float(len(prompts))] for prompt in prompts])


def test_without_a_memory_a_micro_batch_is_one_call():
    encoder = Encoder()
    conditions = Conditions(encoder, 0)
    assert conditions(["a", "bb", "a"])[:, 0].tolist() == [1, 2, 1]
    assert encoder.calls == [["a", "bb", "a"]]


def test_a_remembered_prompt_is_encoded_once_and_alone():
    encoder = Encoder()
    conditions = Conditions(encoder, 10)
    first = conditions(["a", "bb", "a"])
    assert torch.equal(conditions(["bb", "a"]), first[[1, 0]])
    assert encoder.calls == [["a"], ["bb"]]
    assert torch.equal(first, Conditions(Encoder(), 10)(["a", "bb", "a"]))


def test_what_was_used_longest_ago_is_forgotten_first():
    encoder = Encoder()
    conditions = Conditions(encoder, 2)
    conditions(["a", "bb", "a", "ccc", "a", "bb"])
    assert encoder.calls == [["a"], ["bb"], ["ccc"], ["bb"]]
