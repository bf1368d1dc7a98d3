"""What a network predicts, and how it determines the clean sample x0.

Given x_t = alpha x0 + sigma eps, knowing any one of these is knowing all of them:

    eps     the noise                           eps
    x0      the clean sample                    x0
    v       the velocity along the VP circle    v = alpha eps - sigma x0
    flow    the velocity of rectified flow      u = eps - x0
    score   the gradient of log p(x_t)          s = -eps / sigma

A network trained with mean squared error predicts the conditional expectation given x_t. Every line is affine in
(x0, eps), so expectations satisfy the same equations, and for the score this is Tweedie's formula.

*Not* assumed: alpha^2 + sigma^2 = 1 or alpha + sigma = 1. With either of them the usual shorter formulas for v and
flow follow. Division by zero is left to happen: eps and score say nothing about x0 where alpha = 0, and x0 says
nothing about the noise where sigma = 0.

Shapes: samples (B, *), coefficients () or (B,). The arithmetic runs in the dtype of the arguments, so give float32.

References:
    Salimans and Ho 2022, Progressive Distillation, arXiv 2202.00512 (v). Liu et al. 2022, arXiv 2209.03003 (flow).
"""

from typing import Literal, assert_never

from torch import Tensor

Parametrization = Literal["eps", "x0", "v", "flow", "score"]


def append_dims(coefficient: Tensor, ndim: int) -> Tensor:
    """Append dimensions of size 1, so that one coefficient per sample multiplies a whole sample.

    Args:
        coefficient: shape () or (B,).
        ndim: dimensions of the result.

    Returns:
        A view with shape (1, ..., 1) or (B, 1, ..., 1).
    """
    return coefficient.reshape(-1, *[1] * (ndim - 1))


def to_x0(prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, parametrization: Parametrization) -> Tensor:
    """Return the clean sample that a prediction at x_t stands for.

    Args:
        prediction: what the network said, shape (B, *).
        x_t: noisy sample, shape (B, *).
        alpha: coefficient of the signal, shape () or (B,).
        sigma: coefficient of the noise, shape () or (B,).
        parametrization: what ``prediction`` is.

    Returns:
        x0, shape (B, *).
    """
    alpha, sigma = append_dims(alpha, x_t.ndim), append_dims(sigma, x_t.ndim)
    match parametrization:
        case "eps":
            return (x_t - sigma * prediction) / alpha
        case "x0":
            return prediction
        case "v":
            return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
        case "flow":
            return (x_t - sigma * prediction) / (alpha + sigma)
        case "score":
            return (x_t + sigma**2 * prediction) / alpha
        case _:
            assert_never(parametrization)


def from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, parametrization: Parametrization) -> Tensor:
    """Return the prediction at x_t that stands for a clean sample: the inverse of :func:`to_x0`.

    Args:
        x0: clean sample, shape (B, *).
        x_t: noisy sample, shape (B, *).
        alpha: coefficient of the signal, shape () or (B,).
        sigma: coefficient of the noise, shape () or (B,).
        parametrization: what to return.

    Returns:
        The prediction, shape (B, *).
    """
    alpha, sigma = append_dims(alpha, x_t.ndim), append_dims(sigma, x_t.ndim)
    eps = (x_t - alpha * x0) / sigma
    match parametrization:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return alpha * eps - sigma * x0
        case "flow":
            return eps - x0
        case "score":
            return -eps / sigma
        case _:
            assert_never(parametrization)
