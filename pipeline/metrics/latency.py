"""What an image costs: time of each part, measured one call after another with the device idle in between.

    condition = encode_prompts(prompts)      text encoder
    x0        = sample(noise, condition)     network and scheduler
    image     = decode(x0)                   decoder

A call counts from the moment the device has nothing to do until it has nothing to do again; the first ones, which
choose kernels and allocate, do not count. The negative prompt is encoded once beforehand. Writing files is not part of
it. Numbers of two machines do not compare, nor do those of two dtypes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from configs.schema import SamplerConfig
from pipeline.teachers.base import Teacher

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Spread:
    """The middle of several durations: the median and the quartiles around it, in seconds."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, durations: ArrayLike) -> "Spread":
        """Quartiles of some durations, interpolated linearly."""
        lower, median, upper = np.quantile(durations, (0.25, 0.5, 0.75)).tolist()
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Latency:
    """Time of one batch.

    Attributes:
        batch_size: images of a call.
        device: its name.
        dtype: precision of the networks.
        evaluations_per_image: network evaluations, guidance included.
        text_encoder: seconds a batch.
        network: the sampler's, likewise.
        decoder: likewise.
        total: all three.
        images_per_s: batch_size over the median total.
        repetitions: measured calls.
    """

    batch_size: int
    device: str
    dtype: str
    evaluations_per_image: int
    text_encoder: Spread
    network: Spread
    decoder: Spread
    total: Spread
    images_per_s: float
    repetitions: int


@torch.no_grad()
def measure_latency(
    teacher: Teacher,
    sampler: SamplerConfig,
    guidance_scale: float,
    *,
    evaluations_per_image: int,
    batch_size: int,
    prompt: str = "",
    negative_prompt: str = "",
    warm_up: int = 3,
    repetitions: int = 10,
    go_on: Callable[[], None] = lambda: None,
) -> Latency:
    """Time a teacher or a student, which is one with a sampler of one step.

    Args:
        teacher: on the device to measure.
        sampler: as it is used.
        guidance_scale: likewise; it may double the evaluations.
        evaluations_per_image: of :func:`pipeline.teachers.sampler_evaluations`.
        batch_size: images of a call.
        prompt: any; encoders read a fixed number of tokens.
        negative_prompt: of the unconditional branch.
        warm_up: calls that do not count.
        repetitions: calls that do.
        go_on: called before each call, untimed; may raise to stop.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((batch_size, *teacher.identity.sample_shape), generator=generator).to(teacher.device)
    unconditional = teacher.encode_prompts([negative_prompt])
    sample_ids = range(batch_size)
    durations: list[tuple[float, float, float]] = []
    for _ in range(warm_up + repetitions):
        go_on()
        condition, text_s = _timed(teacher.device, lambda: teacher.encode_prompts([prompt] * batch_size))
        x0, network_s = _timed(
            teacher.device,
            lambda condition=condition: teacher.sample(
                noise, condition, unconditional, sampler, guidance_scale, seed=0, sample_ids=sample_ids
            ),
        )
        _, decoder_s = _timed(teacher.device, lambda x0=x0: teacher.decode(x0))
        durations.append((text_s, network_s, decoder_s))
    measured = np.array(durations[warm_up:])
    total = Spread.of(measured.sum(1))
    return Latency(
        batch_size=batch_size,
        device=device_name(teacher.device),
        dtype=teacher.identity.dtype,
        evaluations_per_image=evaluations_per_image,
        text_encoder=Spread.of(measured[:, 0]),
        network=Spread.of(measured[:, 1]),
        decoder=Spread.of(measured[:, 2]),
        total=total,
        images_per_s=batch_size / total.median,
        repetitions=repetitions,
    )


def device_name(device: torch.device) -> str:
    """The device as people know it: a GPU's product name, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _timed(device: torch.device, call: Callable[[], _Result]) -> tuple[_Result, float]:
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
