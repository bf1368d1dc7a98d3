"""The toy teacher: a Gaussian mixture over small pictures, conditioned on their captions, with nothing to train.

    p(x0 | prompt) = mean over the pictures m_k that the prompt names of N(x0; m_k, std^2 I)

Its score is known in closed form (:mod:`pipeline.diffusion.mixture`), so every sample can be judged: it must lie within
a few std of a picture that its prompt names. It works on pixels in [-1, 1], on the EDM schedule, in float32 (float64
inside), on any device.

A prompt is read word by word. Colours and shapes it names restrict the pictures; a prompt without any of the colours
(or shapes) leaves all of them; other words are not understood and ignored. What no single picture can be, such as
``a red blue circle``, stands for any of those it names: red circles and blue circles.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import MixtureTeacherConfig, PairsSettings, SamplerConfig, TeacherIdentity
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.guidance import GuidedDenoiser
from pipeline.diffusion.mixture import GaussianMixture
from pipeline.diffusion.schedules import EDMSchedule
from pipeline.teachers import karras_sampling
from pipeline.teachers.base import Teacher, calls_per_prediction
from pipeline.teachers.digest import canonical_json
from pipeline.teachers.pictures import COLOURS, SHAPES, captions, draw_all


def identify(config: MixtureTeacherConfig) -> TeacherIdentity:
    """The digest is over the parameters and the pictures' float32 bytes, little-endian: the same on every platform."""
    digest = hashlib.sha256(canonical_json({"kind": config.kind, "std": config.std, "captions": captions()}))
    digest.update(_means(config.image_size).numpy().astype("<f4").tobytes())
    shape = (3, config.image_size, config.image_size)
    return TeacherIdentity(
        kind=config.kind,
        weights_digest=digest.hexdigest(),
        dtype="float32",
        parametrization="x0",
        schedule=EDMSchedule.description,
        latent_scale=None,
        sample_shape=shape,
        image_shape=shape,
    )


def check(config: MixtureTeacherConfig, settings: PairsSettings) -> None:
    """Raise UserError when these settings cannot be carried out with this teacher."""
    if settings.sampler.name == "diffusers":
        raise UserError(
            "spec.sampler.name: diffusers is for Stable Diffusion teachers; this one takes edm_heun or ddim"
        )
    if settings.fields.x0 == "latent":
        raise UserError("spec.fields.x0: this teacher works on pixels and has no latent; set x0: pixels")
    if settings.fields.text_embedding:
        raise UserError("spec.fields.text_embedding: this teacher has no text encoder; set text_embedding: false")


def sampler_evaluations(config: MixtureTeacherConfig, sampler: SamplerConfig, guidance_scale: float) -> int:
    """Network evaluations of one sample, for a sampler that :func:`check` has passed."""
    assert sampler.name != "diffusers"
    return karras_sampling.num_predictions(sampler) * calls_per_prediction(guidance_scale)


class MixtureTeacher(Teacher):
    """The mixture as a teacher; a condition is the log-weights of the components, (B, K).

    Args:
        config: size and std of the pictures.
        device: where to compute.
    """

    def __init__(self, config: MixtureTeacherConfig, device: torch.device) -> None:
        self.identity = identify(config)
        self.device = device
        means = _means(config.image_size).to(device)
        count = len(means)
        mixture = GaussianMixture(
            means, torch.full((count,), config.std, device=device), torch.zeros(count, device=device)
        )
        self._denoiser = mixture.as_denoiser(EDMSchedule())

    @property
    def denoiser(self) -> Denoiser:
        """The exact denoiser on the EDM schedule."""
        return self._denoiser

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Log-weights of the components, (B, K), float32: equal for those a prompt names, -inf for the others."""
        return torch.stack([_log_weights(prompt) for prompt in prompts]).to(self.device)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """A prompt is never too long."""
        return [False] * len(prompts)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        condition: Tensor,
        unconditional: Tensor,
        sampler: SamplerConfig,
        guidance_scale: float,
        *,
        seed: int,
        sample_ids: Sequence[int],
    ) -> Tensor:
        """Run ``edm_heun`` or ``ddim`` on the Karras grid."""
        assert sampler.name != "diffusers"
        denoiser = GuidedDenoiser(self.denoiser, unconditional, guidance_scale)
        return karras_sampling.sample(denoiser, noise, condition, sampler, seed=seed, sample_ids=sample_ids)

    def decode(self, x0: Tensor) -> Tensor:
        """x0 is the image."""
        return x0

    def enable_gradient_checkpointing(self) -> None:
        """There is no decoder, and nothing to save."""

    def float32(self) -> AbstractContextManager[None]:
        """It always is."""
        return nullcontext()


def _means(size: int) -> Tensor:
    """The pictures in [-1, 1], (K, 3, size, size), float32; 8-bit levels make the same floats everywhere."""
    return torch.from_numpy(draw_all(size)).float() / 127.5 - 1


def _log_weights(prompt: str) -> Tensor:
    """(K,): 0 for the pictures a prompt names, -inf for the others."""
    words = set(re.findall("[a-z]+", prompt.lower()))
    colours = words & COLOURS.keys() or COLOURS.keys()
    shapes = words & SHAPES.keys() or SHAPES.keys()
    named = torch.tensor([[colour in colours and shape in shapes for shape in SHAPES] for colour in COLOURS])
    return torch.where(named.flatten(), 0.0, -math.inf)
