"""The student: one network evaluation from noise to a clean sample.

    G(z, c) = D(s z, t*, c),        s = prior_std(t*),        z ~ N(0, I)                    (Yin et al. 2024, Sec. 3.1)

The network is the teacher's, told always the same time t*, and read as a denoiser: what the teacher believes at its
noisiest level, trained until the belief is a sample. The noise enters as a sampler would start from it: z itself on a
variance-preserving schedule, whatever t* is, and sigma z on the EDM schedule.

*Not* assumed: that t* is the last time. SDXL-like teachers do better when told an earlier one.

References:
    Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828.
"""

from dataclasses import dataclass

from torch import Tensor

from pipeline.diffusion.denoiser import Network
from pipeline.diffusion.parametrization import append_dims
from pipeline.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class OneStepGenerator:
    """A denoiser at a fixed time as a generator.

    Args:
        denoiser: (x_t float32, t, condition) -> x0 float32.
        schedule: the noise levels that t stands for.
        t: the fixed time t*, shape (), as the schedule takes it.
    """

    denoiser: Network
    schedule: NoiseSchedule
    t: Tensor

    def __call__(self, z: Tensor, condition: Tensor) -> Tensor:
        """Generate.

        Args:
            z: unit Gaussian noise, shape (B, *), float32.
            condition: shape (B, ...), on the same device.

        Returns:
            x0, shape (B, *), float32, unclipped.
        """
        t = self.t.to(z.device)
        x_t = append_dims(self.schedule.prior_std(t), z.ndim) * z
        return self.denoiser(x_t, t.expand(len(z)), condition)
