"""The losses as functions of tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.losses import (
    SIGMA_DATA,
    SMALLEST_WEIGHT,
    critic_weight,
    denoising_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    finite_samples,
)

SHAPE = (4, 3, 5, 2)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_gradient_is_algorithm_2_sample_by_sample() -> None:
    x0, real, fake = normal(0), normal(1), normal(2)
    gradient = distribution_matching_gradient(x0, real, fake)
    for sample in range(len(x0)):
        # p_real and p_fake of the paper's listing: what each denoiser takes away.
        p_real, p_fake = x0[sample] - real[sample], x0[sample] - fake[sample]
        torch.testing.assert_close(gradient[sample], (p_real - p_fake) / p_real.abs().mean())


def test_a_sample_that_is_moved_along_it_comes_nearer_to_the_real_and_leaves_the_fake() -> None:
    """The sign: descent is from the fake score's prediction to the real one's."""
    x0, real, fake = torch.zeros(SHAPE), torch.ones(SHAPE), -torch.ones(SHAPE)
    step = -distribution_matching_gradient(x0, real, fake)
    assert (step * (real - fake) > 0).all()


def test_where_the_fake_score_returns_the_sample_the_mean_magnitude_is_one() -> None:
    x0, real = normal(0), normal(1) * torch.tensor([1e-3, 1.0, 30.0, 1e4]).view(-1, 1, 1, 1)
    gradient = distribution_matching_gradient(x0, real, x0)
    torch.testing.assert_close(gradient.abs().flatten(1).mean(1), torch.ones(4))


@settings(max_examples=30)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10), seed=st.integers(0, 100))
def test_gradient_knows_neither_scale_nor_origin(scale: float, shift: float, seed: int) -> None:
    x0, real, fake = (normal(seed + i).double() for i in range(3))
    moved = distribution_matching_gradient(*(scale * x + shift for x in (x0, real, fake)))
    torch.testing.assert_close(moved, distribution_matching_gradient(x0, real, fake), rtol=1e-6, atol=1e-9)


def test_equal_predictions_give_exactly_zero_even_where_the_teacher_agrees_with_the_sample() -> None:
    x0 = normal(0)
    assert distribution_matching_gradient(x0, x0, x0).eq(0).all()
    assert distribution_matching_gradient(x0, normal(1), normal(1)).eq(0).all()


def test_the_denominator_has_a_floor() -> None:
    x0 = torch.zeros(SHAPE)
    gradient = distribution_matching_gradient(x0, x0, torch.full(SHAPE, 1e-6))
    torch.testing.assert_close(gradient, torch.full(SHAPE, 1e-6 / SMALLEST_WEIGHT))


def test_loss_has_the_gradient_it_was_given_over_the_number_of_elements() -> None:
    x0, gradient = normal(0).requires_grad_(), normal(1)
    loss = distribution_matching_loss(x0, gradient)
    loss.backward()
    torch.testing.assert_close(x0.grad, gradient / math.prod(SHAPE))
    torch.testing.assert_close(loss.detach(), gradient.square().mean() / 2)


def test_denoising_loss_weighs_samples_and_means_over_everything() -> None:
    prediction, x0, weight = normal(0), normal(1), torch.tensor([0.0, 1.0, 2.0, 5.0])
    expected = sum(w * nn.functional.mse_loss(p, x) for w, p, x in zip(weight, prediction, x0, strict=True)) / len(x0)
    torch.testing.assert_close(denoising_loss(prediction, x0, weight), expected)


@settings(max_examples=50)
@given(alpha=st.floats(0.05, 1), sigma=st.floats(0.002, 80))
def test_critic_weights_are_the_named_ones(alpha: float, sigma: float) -> None:
    a, s = torch.tensor([alpha], dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64)
    x_t, x0, error = a * 0.3 + s * -1.2, 0.3, 0.01
    # The squared error in eps of a prediction that is off by ``error`` in x0.
    eps_error = (x_t - a * (x0 + error)) / s - (x_t - a * x0) / s
    torch.testing.assert_close(critic_weight(a, s, "snr") * error**2, eps_error**2, rtol=1e-6, atol=0)
    edm = (s**2 + SIGMA_DATA**2) / (s * SIGMA_DATA) ** 2
    torch.testing.assert_close(critic_weight(a, s, "edm"), edm, rtol=1e-12, atol=0)
    assert critic_weight(a, s, "x0").eq(1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_element_in_any_tensor_marks_its_sample_alone(value: float) -> None:
    tensors = [normal(i).requires_grad_() for i in range(3)]
    assert finite_samples(*tensors).tolist() == [True] * 4
    for number, tensor in enumerate(tensors[:2]):
        tensor.data[number, 2, 4, 1] = value
    assert finite_samples(*tensors).tolist() == [False, False, True, True]
