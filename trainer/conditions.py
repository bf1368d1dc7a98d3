"""Prompts to conditions, with an optional memory.

Without a memory all prompts of a micro-batch are encoded in one call. With one, a prompt that is not in it is encoded
alone: its encoding is then a function of the prompt, to the last bit, and not of the company it came in, so that a run
that was resumed, with an empty memory, computes what it would have computed.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.teachers.base import Teacher


class Conditions:
    """A teacher's prompt encoder.

    Args:
        teacher: whose.
        max_kept: prompts that are remembered; 0 remembers none. Those used longest ago are forgotten first.
    """

    def __init__(self, teacher: Teacher, max_kept: int) -> None:
        self._teacher = teacher
        self._max_kept = max_kept
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Encode B prompts: condition, shape (B, ...), float32, on the teacher's device."""
        if self._max_kept == 0:
            return self._teacher.encode_prompts(prompts)
        return torch.cat([self._remembered(prompt) for prompt in prompts])

    def _remembered(self, prompt: str) -> Tensor:
        if prompt not in self._kept:
            self._kept[prompt] = self._teacher.encode_prompts([prompt])
            if len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(prompt)
        return self._kept[prompt]
