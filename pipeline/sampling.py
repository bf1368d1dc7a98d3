"""What a teacher makes of a batch, and whether it can be kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import PairsRuntime, PairsSpec, TeacherConfig
from pipeline import teachers
from pipeline.teachers.base import Teacher


@dataclass(frozen=True)
class TeacherBatch:
    """What a teacher makes of a batch, on its device.

    Attributes:
        x0: (B, *sample_shape), float32.
        image: (B, 3, H, W), float32 in [-1, 1], unclipped; None when no stored field needs it.
        condition: (B, ...), float32.
    """

    x0: Tensor
    image: Tensor | None
    condition: Tensor

    def one(self, at: int) -> "TeacherBatch":
        """The sample at position ``at``, as a batch of one."""
        image = None if self.image is None else self.image[at : at + 1]
        return TeacherBatch(self.x0[at : at + 1], image, self.condition[at : at + 1])


def load_teacher(config: TeacherConfig, spec: PairsSpec, device: torch.device, runtime: PairsRuntime) -> Teacher:
    """Load a teacher and make sure that it is the one of ``spec``.

    Raises:
        UserError: it is another one; every field that differs is named.
    """
    teacher = teachers.load(config, device, compile=runtime.compile, channels_last=runtime.channels_last)
    teachers.check_identity(teacher.identity, spec.teacher, where="the dataset")
    return teacher


def sample_batch(
    teacher: Teacher,
    spec: PairsSpec,
    noises: NDArray[np.float16],
    condition: Tensor,
    unconditional: Tensor,
    ids: Sequence[int],
) -> Tensor:
    """Run the teacher's sampler on one batch as ``spec`` says.

    Args:
        teacher: the teacher of ``spec``.
        spec: sampler, guidance_scale, seed.
        noises: (B, *sample_shape), float16, unit variance.
        condition: (B, ...), encodings of the prompts.
        unconditional: (1, ...), encoding of the negative prompt.
        ids: B sample ids, from which stochastic samplers derive their randomness.

    Returns:
        x0, (B, *sample_shape), float32.
    """
    z = torch.from_numpy(noises).to(teacher.device, torch.float32)
    return teacher.sample(
        z, condition, unconditional, spec.sampler, spec.guidance_scale, seed=spec.seed, sample_ids=list(ids)
    )


def rejection_reasons(batch: TeacherBatch, spec: PairsSpec, num_expected: int) -> list[str | None]:
    """Why each sample of a batch cannot be kept, or None.

    A sample is bad when what is to be stored of it is not finite (in float16, where most of it is stored), or when x0
    or the image is constant or of a wrong shape.

    Raises:
        ValueError: the teacher returned another number of samples than it was given.
    """
    reasons: list[str | None] = [None] * num_expected
    embedding = batch.condition if spec.fields.text_embedding else None
    for name, values, shape in (
        ("x0", batch.x0, spec.teacher.sample_shape),
        ("image", batch.image, spec.teacher.image_shape),
        ("text embedding", embedding, None),
    ):
        if values is None:
            continue
        if len(values) != num_expected:
            raise ValueError(f"the teacher returned {len(values)} times {name} for {num_expected} samples")
        if shape is not None and tuple(values.shape[1:]) != tuple(shape):
            return [f"{name} has a wrong shape"] * num_expected
        flat = values.half().float().flatten(1)
        finite = flat.isfinite().all(1)
        constant = (flat.amax(1) == flat.amin(1)) & (shape is not None)
        for i, (is_finite, is_constant) in enumerate(zip(finite.tolist(), constant.tolist(), strict=True)):
            if reasons[i] is None and not is_finite:
                reasons[i] = f"{name} is not finite"
            elif reasons[i] is None and is_constant:
                reasons[i] = f"{name} is constant"
    return reasons
