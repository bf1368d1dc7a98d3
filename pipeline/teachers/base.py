"""What a teacher is to everything downstream: prompts in, pictures out, and a frozen denoiser.

    condition = encode_prompts(prompts)
    x0        = sample(noise, condition, unconditional, sampler, guidance_scale, seed, sample_ids)
    image     = decode(x0)

A sample is a function of its noise, its prompt, the sampler, the seed and its id: never of the other samples of its
batch, nor of a batch before it. A batch of another size changes x0 by rounding only.

*Not* assumed: that x0 is a latent, that the condition is a text embedding, or that the sampler is deterministic.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.schema import SamplerConfig, TeacherIdentity
from pipeline.diffusion.denoiser import Denoiser


@dataclass(frozen=True)
class StudentUsage:
    """What a student's card says about running it; it depends on the teacher's kind.

    Attributes:
        metadata: lines of YAML at the top of the card.
        about: what comes out of what, as the beginning of a sentence.
        parts: a sentence about what else is in the folder.
        code: Python that draws images.
        where: where the code runs, as the end of a sentence.
    """

    metadata: str
    about: str
    parts: str
    code: str
    where: str


class Teacher(ABC):
    """A frozen text-to-image diffusion model on one device.

    Attributes:
        identity: what makes two teachers the same; computed from the very files that were loaded.
        device: where its networks are, and where every tensor below has to be.
    """

    identity: TeacherIdentity
    device: torch.device

    @property
    @abstractmethod
    def denoiser(self) -> Denoiser:
        """The network as (x_t, t, condition) -> x0, in the precision it runs in now. Ask for it anew in `float32`."""

    @staticmethod
    def call(network: Callable[..., Any], x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Evaluate a network of this teacher's kind, such as a student, which may be wrapped.

        ``Denoiser(partial(teacher.call, network), teacher.denoiser.schedule, teacher.denoiser.parametrization)`` is the
        network as a denoiser.

        Args:
            network: the module, in any wrapper that hands its arguments on.
            x_t: (B, *sample_shape), in the network's precision.
            t: () or (B,).
            condition: (B, ...), in the network's precision.

        Returns:
            The prediction, (B, *sample_shape), in whatever precision the network gives.
        """
        return network(x_t, t, condition)

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Turn prompts into what the network takes.

        Args:
            prompts: B texts; an empty one stands for no condition.

        Returns:
            condition, shape (B, ...), float32.
        """

    @abstractmethod
    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Say of each prompt whether :meth:`encode_prompts` reads only its beginning, because it is too long."""

    @abstractmethod
    def sample(
        self,
        noise: Tensor,
        condition: Tensor,
        unconditional: Tensor,
        sampler: SamplerConfig,
        guidance_scale: float,
        *,
        seed: int,
        sample_ids: Sequence[int],
    ) -> Tensor:
        """Run the sampler.

        Args:
            noise: (B, *sample_shape), float32, unit variance; scaling to the first noise level happens inside.
            condition: (B, ...), of :meth:`encode_prompts`.
            unconditional: (1, ...) or (B, ...), of :meth:`encode_prompts` for the negative prompt.
            sampler: of a kind that this teacher can be sampled with.
            guidance_scale: w in x_uncond + w (x_cond - x_uncond).
            seed: root of the randomness that a stochastic sampler adds.
            sample_ids: B ids; the randomness added to a sample derives from (seed, id, step) and nothing else.

        Returns:
            x0, (B, *sample_shape), float32, unclipped.
        """

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """Turn x0, (B, *sample_shape), into images, (B, 3, H, W), float32, black -1 to white 1, unclipped.

        Gradients flow from the images to x0 if torch records them, and never to the teacher, which is frozen.
        """

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """From now on :meth:`decode` computes activations again in the backward pass: less memory, more time."""

    @abstractmethod
    def float32(self) -> AbstractContextManager[None]:
        """Run every network in float32 inside the context; afterwards precision and weights are as they were.

        For a sample that overflowed in half precision. The weights are those loaded, widened, not those in the file.
        Not for two threads at a time, nor for a teacher that was loaded under ``torch.inference_mode``.
        """


def calls_per_prediction(guidance_scale: float) -> int:
    """Network evaluations of one guided prediction: with w = 0 or w = 1 one branch is enough."""
    return 1 if guidance_scale in (0, 1) else 2
