from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.diffusion.parametrization import Parametrization, append_dims, from_x0, to_x0

PARAMETRIZATIONS = get_args(Parametrization)


def float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


coefficients = st.floats(0.05, 20).map(float64)
samples = st.lists(st.floats(-100, 100), min_size=3, max_size=3).map(lambda row: float64([row]))


def test_names() -> None:
    assert set(PARAMETRIZATIONS) == {"eps", "x0", "v", "flow", "score"}


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@given(alpha=coefficients, sigma=coefficients, x0=samples, eps=samples)
def test_conversions_agree_with_the_perturbation_and_invert(
    parametrization: Parametrization, alpha: Tensor, sigma: Tensor, x0: Tensor, eps: Tensor
) -> None:
    """The definition of every prediction, on any alpha and sigma, not only where they are on a circle or a line."""
    x_t = alpha * x0 + sigma * eps
    definition = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0, "score": -eps / sigma}
    prediction = from_x0(x0, x_t, alpha, sigma, parametrization)
    torch.testing.assert_close(prediction, definition[parametrization], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(to_x0(prediction, x_t, alpha, sigma, parametrization), x0, rtol=1e-9, atol=1e-9)


@given(angle=st.floats(0.01, 1.55).map(float64), x0=samples, eps=samples)
def test_v_on_the_vp_circle(angle: Tensor, x0: Tensor, eps: Tensor) -> None:
    """Salimans and Ho: x0 = alpha x_t - sigma v and eps = sigma x_t + alpha v; v is dx_t / dangle."""
    a, s = angle.cos(), angle.sin()
    x_t = a * x0 + s * eps
    v = from_x0(x0, x_t, a, s, "v")
    torch.testing.assert_close(a * x_t - s * v, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(s * x_t + a * v, eps, rtol=1e-9, atol=1e-9)
    later = angle + 1e-6
    torch.testing.assert_close((later.cos() * x0 + later.sin() * eps - x_t) / 1e-6, v, rtol=1e-3, atol=1e-3)


@given(t=st.floats(0.01, 0.99).map(float64), x0=samples, eps=samples)
def test_flow_on_the_straight_line(t: Tensor, x0: Tensor, eps: Tensor) -> None:
    """Rectified flow: x_t - t u is the start of the line, x_t + (1 - t) u its end."""
    a, s = 1 - t, t
    x_t = a * x0 + s * eps
    u = from_x0(x0, x_t, a, s, "flow")
    torch.testing.assert_close(x_t - s * u, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x_t + a * u, eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_coefficients_belong_to_their_own_sample(parametrization: Parametrization, generator: torch.Generator) -> None:
    x_t, prediction = torch.randn(2, 3, 2, 4, 4, generator=generator)
    alpha, sigma = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.1, 2.0, 0.7])
    together = to_x0(prediction, x_t, alpha, sigma, parametrization)
    for row in range(3):
        alone = to_x0(prediction[row, None], x_t[row, None], alpha[row], sigma[row], parametrization)
        torch.testing.assert_close(together[row, None], alone, rtol=0, atol=0)


def test_predictions_that_survive_zero_snr() -> None:
    """At alpha = 0 the network's v still says what x0 is, and eps does not."""
    x_t, x0 = torch.tensor([[0.7, -1.2]]), torch.tensor([[0.2, 0.4]])
    alpha, sigma = torch.tensor(0.0), torch.tensor(1.0)
    torch.testing.assert_close(to_x0(-x0, x_t, alpha, sigma, "v"), x0)
    assert not to_x0(x_t + 0.1, x_t, alpha, sigma, "eps").isfinite().any()


def test_unknown_parametrization_is_an_error() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(AssertionError, match="epsilon"):
        to_x0(one, one, one[0], one[0], "epsilon")
    with pytest.raises(AssertionError, match="epsilon"):
        from_x0(one, one, one[0], one[0], "epsilon")


@pytest.mark.parametrize(("shape", "expected"), [((), (1, 1, 1, 1)), ((5,), (5, 1, 1, 1))])
def test_append_dims(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert append_dims(torch.zeros(shape), 4).shape == expected
