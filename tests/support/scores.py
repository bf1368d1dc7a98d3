"""Small scores to put into the losses of distillation: exact ones, watched ones, and networks of a hundred weights."""

import torch
from torch import Tensor, nn

from configs.train_schema import LossConfig
from pipeline.diffusion.denoiser import Network
from pipeline.diffusion.schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from trainer.dmd import DistributionMatching

VP = VPSchedule.from_diffusers(
    {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
)
SCHEDULES = [VP, EDMSchedule(), FlowSchedule()]
NOTHING = torch.zeros(8, 1)
SHAPE = (8, 3, 4, 4)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(seed: int = 0) -> "OneStream":
    return OneStream(rng(seed))


class OneStream:
    """Draws for any batch from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def integers(self, first: int, last: int, count: int) -> Tensor:
        return torch.randint(first, last + 1, (count,), generator=self._generator)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=rng(seed))


class Spy:
    """A denoiser that remembers what it was asked."""

    def __init__(self, denoise: Network) -> None:
        self.denoise = denoise
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((x_t, t, condition))
        return self.denoise(x_t, t, condition)


class Affine(nn.Module):
    """The smallest network whose prediction depends on everything: a convolution, the time and the condition."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(seed, (3, 3, 3, 3)) / 5)
        self.bias = nn.Parameter(normal(seed + 1, (3,)))

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        told = (t.float().log1p() + condition.sum(1)).view(-1, 1, 1, 1)
        return nn.functional.conv2d(x_t / (1 + t.float().view(-1, 1, 1, 1)), self.weight, self.bias, padding=1) + told


def in_bfloat16(network: nn.Module) -> Network:
    """The network under autocast, as a mixed-precision run calls it: bfloat16 comes out."""

    def call(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(x_t, t, condition).bfloat16()

    return call


def constant(value: Tensor | float) -> Network:
    return lambda x_t, t, condition: torch.as_tensor(value).expand(x_t.shape)


def matching(real: Network, fake: Network, schedule: NoiseSchedule, **loss: object) -> DistributionMatching:
    return DistributionMatching(real, fake, schedule, LossConfig.model_validate(loss))


def at_one_time(num_times: int, time: int) -> dict[str, float]:
    """A range of times that holds one index only."""
    return {"t_min": (time - 0.2) / num_times, "t_max": (time + 0.2) / num_times}
