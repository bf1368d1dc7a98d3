"""The same few noises and prompts again and again: what the student makes of them, next to its teacher.

    one row a prompt:   teacher, many steps | teacher, 1 step | student | student EMA

The first column is what the student is to learn, the second what it started as. Noise is derived
(:mod:`pipeline.noise`) and samplers are deterministic, so training goes on as if no picture had been drawn. The
teacher's columns are computed once.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from configs.schema import DiffusersSampler, EdmHeunSampler
from pipeline.diffusion.generator import OneStepGenerator
from pipeline.noise import noise as derived_noise
from pipeline.shards.members import to_uint8
from pipeline.teachers.base import Teacher

_BATCH_SIZE = 4
"""Samples made together: a decoder takes a gigabyte for each large picture."""
_TILE_PIXELS = 192
"""Smaller pictures are drawn larger by a whole factor, up to this size."""
_TEXT_PIXELS = 26
"""Height of a line of text."""
_MARGIN_PIXELS = 8


@dataclass(frozen=True)
class GridInputs:
    """What a grid is made from.

    Attributes:
        noise: (B, *sample_shape), float16, unit variance.
        prompts: B texts.
        teacher_images: (B, 3, H, W), float32, in [-1, 1], on the CPU: what the teacher's sampler made of them.
        teacher_title: how, as the title of that column.
    """

    noise: Tensor
    prompts: Sequence[str]
    teacher_images: Tensor
    teacher_title: str = "teacher (pairs)"

    @classmethod
    def from_teacher(
        cls,
        teacher: Teacher,
        prompts: Sequence[str],
        *,
        seed: int,
        guidance_scale: float,
        negative_prompt: str,
        steps: int,
    ) -> "GridInputs":
        """Draw noise and run the teacher's sampler, where there are no pairs to take both from.

        Args:
            teacher: on its device.
            prompts: one for each sample.
            seed: noise = f(seed, number of the prompt), in a stream of its own.
            guidance_scale: of the sampler.
            negative_prompt: of its unconditional branch.
            steps: of DDIM, or of Heun's method for a teacher on the EDM schedule.
        """
        is_edm = teacher.identity.schedule == "edm"
        sampler = EdmHeunSampler(steps=steps) if is_edm else DiffusersSampler(scheduler="DDIMScheduler", steps=steps)
        shape = teacher.identity.sample_shape
        noise = torch.from_numpy(np.stack([derived_noise(seed, i, shape, "grid") for i in range(len(prompts))]))
        unconditional = teacher.encode_prompts([negative_prompt])

        def many_steps(z: Tensor, condition: Tensor) -> Tensor:
            return teacher.sample(
                z, condition, unconditional, sampler, guidance_scale, seed=seed, sample_ids=range(len(z))
            )

        return cls(noise, prompts, _images(teacher, many_steps, noise, prompts), f"teacher, {steps} steps")


class SampleGrid:
    """Draws the grid of a run, each time with the same noises and prompts.

    Args:
        teacher: encodes the prompts, decodes x0, and is a column itself.
        inputs: noises, prompts and what the teacher's sampler made of them.
        t: the student's fixed time, shape (), as the teacher's schedule takes it.
    """

    def __init__(self, teacher: Teacher, inputs: GridInputs, t: Tensor) -> None:
        self._teacher = teacher
        self._inputs = inputs
        self._t = t

    def write(self, path: Path, students: Mapping[str, OneStepGenerator]) -> None:
        """Write a PNG, aside and renamed.

        Args:
            path: the file; its folder is made.
            students: title of a further column -> generator, called on the teacher's device.
        """
        picture = draw_grid(self._teacher_columns | self._columns(students), self._inputs.prompts)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.tmp")
        picture.save(aside, format="PNG")
        os.replace(aside, path)

    @cached_property
    def _teacher_columns(self) -> dict[str, Tensor]:
        denoiser = self._teacher.denoiser
        one_step = OneStepGenerator(denoiser, denoiser.schedule, self._t)
        many_steps = {self._inputs.teacher_title: self._inputs.teacher_images}
        return many_steps | self._columns({"teacher, 1 step": one_step})

    def _columns(self, generators: Mapping[str, OneStepGenerator]) -> dict[str, Tensor]:
        noise, prompts = self._inputs.noise, self._inputs.prompts
        return {title: _images(self._teacher, generate, noise, prompts) for title, generate in generators.items()}


@torch.no_grad()
def _images(
    teacher: Teacher, generate: Callable[[Tensor, Tensor], Tensor], noise: Tensor, prompts: Sequence[str]
) -> Tensor:
    """What (z, condition) -> x0 makes of noises and prompts, decoded: (B, 3, H, W), float32, on the CPU."""
    images: list[Tensor] = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        z = noise[start : start + _BATCH_SIZE].to(teacher.device, torch.float32)
        condition = teacher.encode_prompts(prompts[start : start + _BATCH_SIZE])
        with torch.compiler.set_stance("force_eager"):  # compiled for these shapes too, training would be slower
            images.append(teacher.decode(generate(z, condition)).cpu())
    return torch.cat(images)


def draw_grid(columns: Mapping[str, Tensor], prompts: Sequence[str]) -> Image.Image:
    """Pictures in titled columns, one row a prompt, each row under its prompt.

    Args:
        columns: title -> (B, 3, H, W), float32, on the CPU, black -1 to white 1; values beyond are clipped.
        prompts: B texts, cut to the width of the grid.
    """
    height, width = next(iter(columns.values())).shape[2:]
    scale = max(1, _TILE_PIXELS // max(height, width))  # by whole pixels: small pictures are shown, not smoothed
    tile = (width * scale, height * scale)
    step = (max(tile[0], _TILE_PIXELS) + _MARGIN_PIXELS, tile[1] + _TEXT_PIXELS + _MARGIN_PIXELS)
    size = (_MARGIN_PIXELS + len(columns) * step[0], _TEXT_PIXELS + len(prompts) * step[1] + _MARGIN_PIXELS)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    title_font, prompt_font = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    lefts = [_MARGIN_PIXELS + column * step[0] for column in range(len(columns))]
    tops = [_TEXT_PIXELS + row * step[1] for row in range(len(prompts))]
    for left, title in zip(lefts, columns, strict=True):
        draw.text((left, 6), title, fill="black", font=title_font)
    for top, prompt in zip(tops, prompts, strict=True):
        line = _cut(prompt, prompt_font, size[0] - 2 * _MARGIN_PIXELS)
        draw.text((lefts[0], top + 5), line, fill="dimgray", font=prompt_font)
    for left, images in zip(lefts, columns.values(), strict=True):
        for top, image in zip(tops, images.numpy(), strict=True):
            picture = Image.fromarray(to_uint8(image)).resize(tile, Image.Resampling.NEAREST)
            grid.paste(picture, (left, top + _TEXT_PIXELS))
    return grid


def _cut(prompt: str, font: ImageFont.FreeTypeFont, pixels: int) -> str:
    """A prompt on one line of at most so many pixels."""
    line = " ".join(prompt.split()) or "(empty prompt)"
    if font.getlength(line) <= pixels:
        return line
    count = bisect_right(range(len(line)), pixels, key=lambda count: font.getlength(f"{line[:count]} ..."))
    return f"{line[: count - 1].rstrip()} ..."
