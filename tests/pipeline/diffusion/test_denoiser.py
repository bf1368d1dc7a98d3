import pytest
import torch
from torch import Tensor

from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.parametrization import Parametrization, append_dims, from_x0
from pipeline.diffusion.schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule

VP = VPSchedule.from_diffusers(
    {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
)
TIMESTEPS = torch.tensor([10, 500, 999])


class Recorder:
    """A network that writes down the dtypes it is called with and answers a constant."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer
        self.calls: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((x_t.dtype, t.dtype, condition.dtype))
        self.seen.append((x_t, t, condition))
        return self.answer.to(x_t.dtype)


@pytest.mark.parametrize(
    ("schedule", "t"),
    [
        (VP, TIMESTEPS),
        (EDMSchedule(), torch.tensor([0.002, 1.0, 80.0])),
        (FlowSchedule(), torch.tensor([0.1, 0.5, 0.9])),
    ],
    ids=["vp", "edm", "flow"],
)
@pytest.mark.parametrize("parametrization", ["eps", "x0", "v", "flow", "score"])
def test_a_network_that_knows_the_answer_is_a_perfect_denoiser(
    schedule: NoiseSchedule, t: Tensor, parametrization: Parametrization, generator: torch.Generator
) -> None:
    x0, eps = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    alpha, sigma = (append_dims(coefficient.double(), 4) for coefficient in schedule(t))
    x_t = alpha * x0 + sigma * eps

    def network(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return from_x0(x0, x_t, *(coefficient.double() for coefficient in schedule(t)), parametrization)

    result = Denoiser(network, schedule, parametrization)(x_t.float(), t, torch.zeros(3, 1))
    assert result.dtype == torch.float32
    # Rounding x_t and eps to float32 is amplified by sigma / alpha, at most 80 here.
    torch.testing.assert_close(result.double(), x0, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_only_the_network_sees_the_low_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    x_t, answer, condition = torch.randn(3, 3, 2, 4, 4, generator=generator)
    network = Recorder(answer)
    denoiser = Denoiser(network, VP, "eps", network_dtype=dtype)
    x0 = denoiser(x_t, TIMESTEPS, condition)
    assert network.calls == [(dtype, torch.int64, dtype)]
    assert torch.equal(network.seen[0][1], TIMESTEPS)
    # Given the rounded answer of the network, every further operation is float32 on the unrounded x_t.
    alpha, sigma = (append_dims(coefficient, 4) for coefficient in VP(TIMESTEPS))
    assert x0.dtype == alpha.dtype == torch.float32
    torch.testing.assert_close(x0, (x_t - sigma * answer.to(dtype).float()) / alpha, rtol=0, atol=0)


def test_predict_is_the_raw_network_in_float32(generator: torch.Generator) -> None:
    x_t, answer = torch.randn(2, 3, 5, generator=generator)
    prediction = Denoiser(Recorder(answer), VP, "eps", torch.bfloat16).predict(x_t, TIMESTEPS, x_t)
    assert prediction.dtype == torch.float32
    assert torch.equal(prediction, answer.bfloat16().float())


def test_one_time_for_the_whole_batch(generator: torch.Generator) -> None:
    x_t, answer = torch.randn(2, 3, 5, generator=generator)
    denoiser = Denoiser(Recorder(answer), VP, "v")
    assert torch.equal(denoiser(x_t, torch.tensor(7), x_t), denoiser(x_t, torch.tensor([7, 7, 7]), x_t))
