import pytest
import torch
from torch import Tensor

from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.guidance import GuidedDenoiser, guided
from pipeline.diffusion.parametrization import Parametrization, to_x0
from pipeline.diffusion.schedules import VPSchedule

VP = VPSchedule.from_diffusers(
    {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
)


class CountingFunction:
    """Row by row: condition * x_t + t, so that mixed-up rows, times or conditions change the result."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.batches.append(condition)
        return condition * x_t + t.expand(len(x_t))[:, None]


X_T = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])
T = torch.tensor([10, 20, 30])
CONDITION = torch.tensor([[1.0], [2.0], [3.0]])
UNCONDITIONAL = torch.tensor([[-1.0]])


def test_without_guidance_there_is_one_conditional_call() -> None:
    function = CountingFunction()
    result = guided(function, X_T, T, CONDITION, UNCONDITIONAL, guidance_scale=1)
    assert [batch.tolist() for batch in function.batches] == [CONDITION.tolist()]
    assert torch.equal(result, CONDITION * X_T + T[:, None])


def test_scale_zero_is_one_unconditional_call() -> None:
    function = CountingFunction()
    result = guided(function, X_T, T, CONDITION, UNCONDITIONAL, guidance_scale=0)
    assert [batch.tolist() for batch in function.batches] == [[[-1.0]] * 3]
    assert torch.equal(result, -X_T + T[:, None])


@pytest.mark.parametrize("guidance_scale", [0.5, 3.0, 7.5])
@pytest.mark.parametrize("t", [T, torch.tensor(10)], ids=["t per sample", "one t"])
@pytest.mark.parametrize("rows", [1, 3])
def test_guidance_is_one_batched_call_and_the_formula(guidance_scale: float, t: Tensor, rows: int) -> None:
    """x_uncond + w (x_cond - x_uncond) with x_uncond = -x + t and x_cond = c x + t: (w (c + 1) - 1) x + t."""
    function = CountingFunction()
    result = guided(function, X_T, t, CONDITION, UNCONDITIONAL.expand(rows, 1), guidance_scale)
    assert [batch.tolist() for batch in function.batches] == [[[-1.0]] * 3 + CONDITION.tolist()]
    expected = (guidance_scale * (CONDITION + 1) - 1) * X_T + t.expand(3)[:, None]
    torch.testing.assert_close(result, expected)


def test_the_general_formula_agrees_with_both_shortcuts() -> None:
    """w next to 1 and next to 0 goes through the batched call: no jump, so w = 1 does mean no guidance."""
    for shortcut, nearby in [(1, 1 + 1e-6), (0, 1e-6)]:
        torch.testing.assert_close(
            guided(CountingFunction(), X_T, T, CONDITION, UNCONDITIONAL, shortcut),
            guided(CountingFunction(), X_T, T, CONDITION, UNCONDITIONAL, nearby),
            rtol=1e-4,
            atol=1e-4,
        )


def test_the_difference_is_taken_in_float32() -> None:
    """1 + 2^-8 is no bfloat16; guidance of a bfloat16 function must not round its result to one."""

    def function(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return condition.bfloat16()

    result = guided(function, X_T[:1], T[:1], torch.tensor([[1.0]]), torch.tensor([[0.0]]), 1 + 2**-8)
    assert result.dtype == torch.float32
    assert result.item() == 1 + 2**-8
    assert guided(function, X_T[:1], T[:1], torch.ones(1, 1), torch.ones(1, 1), 1).dtype == torch.float32


@pytest.mark.parametrize("parametrization", ["eps", "v", "flow", "score"])
def test_guiding_x0_is_guiding_the_prediction(parametrization: Parametrization, generator: torch.Generator) -> None:
    x_t, condition = torch.randn(2, 3, 2, 4, 4, generator=generator)
    unconditional = torch.zeros(1, 2, 4, 4)
    t = torch.tensor([100, 400, 700])

    def network(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return torch.tanh(x_t + condition)

    denoiser = Denoiser(network, VP, parametrization)
    guided_x0 = GuidedDenoiser(denoiser, unconditional, 4.0)(x_t, t, condition)
    prediction = guided(denoiser.predict, x_t, t, condition, unconditional, 4.0)
    torch.testing.assert_close(guided_x0, to_x0(prediction, x_t, *VP(t), parametrization), rtol=1e-4, atol=1e-4)
