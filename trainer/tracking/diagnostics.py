"""What tells a healthy run from a sick one. Looks at tensors that are there anyway, and calls no network.

    dm/rms_gradient           root mean square of g: about how far, in units of Eq. 8, the two scores are apart
    dm/mean_abs_x0_minus_real mean |x0 - x0_real|: the denominator of g; near 0, the teacher has nothing to say
    dm/mean_abs_fake_minus_real   its numerator
    dm/cosine/bucketN         cosine between x0_real and x0_fake in the N-th quarter of the times, from little noise to
                              much: near 1, and least so where the student is wrong
    student/mean, student/std of the samples: an oscillation here is brightness, and a critic that lags behind

References:
    Yin et al. 2024, Improved Distribution Matching Distillation, arXiv 2405.14867, App. C, for the oscillation.
"""

import torch
from torch import Tensor

from trainer.dmd import ScoreComparison
from trainer.tracking.metrics import Metrics

NUM_BUCKETS = 4


def observe_samples(metrics: Metrics, x0: Tensor) -> None:
    """Note what the student's samples, (B, *), look like as numbers."""
    metrics.add("student/mean", x0.detach().flatten(1).mean(1))
    metrics.add("student/std", x0.detach().flatten(1).std(1))


def observe_scores(metrics: Metrics, x0: Tensor, comparison: ScoreComparison, num_times: int) -> None:
    """Note how the two scores compare at the student's samples.

    Args:
        metrics: where to.
        x0: the student's samples, (B, *).
        comparison: what the scores said of them.
        num_times: T.
    """
    real, fake = comparison.x0_real.flatten(1), comparison.x0_fake.flatten(1)
    metrics.add("dm/rms_gradient", comparison.gradient.square().flatten(1).mean(1), root=True)
    metrics.add("dm/mean_abs_x0_minus_real", (x0.detach().flatten(1) - real).abs().mean(1))
    metrics.add("dm/mean_abs_fake_minus_real", (fake - real).abs().mean(1))
    cosine = torch.nn.functional.cosine_similarity(real, fake, dim=1)
    metrics.add_binned("dm/cosine", cosine, comparison.time * NUM_BUCKETS // num_times, NUM_BUCKETS)
