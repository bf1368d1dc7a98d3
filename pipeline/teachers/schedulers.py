"""Sampling with a diffusers scheduler: which ones, made from which config, and the loop around them.

    x_T = init_noise_sigma * noise
    for t in timesteps:  x <- step(prediction(scale(x, t), t), t, x)

A scheduler starts from the config in the teacher's folder, exactly as ``SchedulerClass.from_config(own config)`` does,
and the options of the sampler replace entries of it. What diffusers leaves unsaid is refused here: an option that the
class does not know (diffusers drops it in silence), an option that redefines what the network was trained on, and a
scheduler whose randomness cannot be derived per sample.

Every batch starts from a copy of a fresh scheduler, because multistep schedulers remember. Its arithmetic is float32.
Nothing is clipped or thresholded unless an option asks for it.
"""

import copy
import difflib
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from configs.schema import DiffusersSampler

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.diffusion.schedules import VPSchedule

SUITABLE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers over discrete variance-preserving timesteps whose noise, if any, comes from the generators they are given.

DPMSolverSDEScheduler is not among them: it draws from a Brownian tree of its own, one for the whole batch.
"""

TRAINED_WITH = frozenset(
    {
        "beta_end",
        "beta_schedule",
        "beta_start",
        "num_train_timesteps",
        "prediction_type",
        "rescale_betas_zero_snr",
        "trained_betas",
        "use_flow_sigmas",
    }
)
"""Config entries that say what the network was trained on. They belong to the teacher, not to its sampler."""

STEP_OPTIONS = frozenset({"eta", "s_churn", "s_tmin", "s_tmax", "s_noise"})
"""Options that are not config entries but arguments of ``step``, in the classes that have them."""

PIPELINE_ENTRIES = {"steps_offset": 1, "clip_sample": False}
"""StableDiffusionPipeline forces these on the scheduler it loads; here they hold for every scheduler that has them.

Otherwise a DDIMScheduler made from a PNDMScheduler's config would clip latents to [-1, 1], its default.
"""


class SchedulerLoop:
    """The settings of a sampler made into a function from noise to x0.

    The scheduler is made once, which takes a second for some classes, and copied for every batch in the state it has
    before the first step.

    Args:
        sampler: which scheduler, how many steps, which options.
        own_config: the scheduler config in the teacher's folder.
        device: where the timesteps are wanted.

    Attributes:
        sampler: the settings.
        num_predictions: network predictions of one run. PNDM with 50 steps: 51; Heun with 50: 99.
    """

    def __init__(
        self, sampler: DiffusersSampler, own_config: Mapping[str, Any], device: "torch.device | str" = "cpu"
    ) -> None:
        self.sampler = sampler
        self._scheduler = make_scheduler(sampler, own_config, device)
        self.num_predictions = len(self._scheduler.timesteps)

    def __call__(
        self, predict: "Callable[[Tensor, Tensor], Tensor]", noise: "Tensor", generators: "list[torch.Generator]"
    ) -> "Tensor":
        """Sample from unit noise.

        Args:
            predict: (x_t, t) -> the network's prediction; shapes (B, *), () -> (B, *), float32.
            noise: (B, *), float32, unit variance.
            generators: B generators on the CPU; schedulers without randomness do not use them.

        Returns:
            x0, (B, *), float32.
        """
        scheduler = copy.deepcopy(self._scheduler)
        arguments: dict[str, Any] = {k: v for k, v in self.sampler.options.items() if k in STEP_OPTIONS}
        if "generator" in inspect.signature(scheduler.step).parameters:
            arguments["generator"] = generators
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            prediction = predict(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(prediction, t, x, return_dict=False, **arguments)[0]
        return x


def check_sampler(sampler: DiffusersSampler, own_config: Mapping[str, Any], schedule: "VPSchedule") -> None:
    """Find every mistake in a sampler's settings, by running it once on four numbers.

    Args:
        sampler: the settings.
        own_config: the scheduler config in the teacher's folder.
        schedule: the noise levels the teacher was trained on.

    Raises:
        UserError: the scheduler does not exist or does not suit, it refuses an option or the number of steps, or it
            cannot follow the teacher's noise schedule.
    """
    import torch

    try:
        levels = make_scheduler(sampler, own_config).alphas_cumprod
        loop = SchedulerLoop(sampler, own_config)
        x0 = loop(lambda x_t, t: 0 * x_t, torch.ones(1, 1, 2, 2), sample_generators(0, [0]))
    except UserError:
        raise
    except Exception as error:  # diffusers raises many kinds, or stumbles; on four numbers the settings are the cause
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"spec.sampler: {sampler.scheduler} with {sampler.steps} steps: {reason}") from error
    if not torch.allclose(levels, schedule.alphas_cumprod, rtol=1e-5, atol=1e-6):
        raise UserError(
            f"spec.sampler.scheduler: {sampler.scheduler} cannot follow the teacher's schedule {schedule.description}; "
            "use another one, such as DDIMScheduler or EulerDiscreteScheduler"
        )
    if not x0.isfinite().all():
        raise UserError(f"spec.sampler: {sampler.scheduler} with {sampler.steps} steps does not end in finite numbers")


def make_scheduler(
    sampler: DiffusersSampler, own_config: Mapping[str, Any], device: "torch.device | str" = "cpu"
) -> Any:
    """A fresh scheduler with its timesteps set.

    Raises:
        UserError: the scheduler does not exist or does not suit, or an option is not one of its own.
    """
    scheduler_class = _scheduler_class(sampler.scheduler)
    entries = set(inspect.signature(scheduler_class.__init__).parameters) - {"self"}
    _check_options(sampler, entries, set(inspect.signature(scheduler_class.step).parameters))
    overrides = {**PIPELINE_ENTRIES, **sampler.options}
    scheduler = scheduler_class.from_config(
        dict(own_config), **{key: value for key, value in overrides.items() if key in entries}
    )
    scheduler.set_timesteps(sampler.steps, device=device)
    return scheduler


def sample_generators(seed: int, sample_ids: Sequence[int]) -> "list[torch.Generator]":
    """One generator per sample, seeded by blake2b("{seed}/{sample_id}/scheduler") whatever the batch.

    torch keeps 32 bits of a CPU generator's seed: of a million samples some hundred pairs share their *added* noise.
    The noise a sample starts from has no such limit.
    """
    import torch

    generators: list[torch.Generator] = []
    for sample_id in sample_ids:
        digest = hashlib.blake2b(f"{seed}/{sample_id}/scheduler".encode(), digest_size=8).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "little")))
    return generators


def _scheduler_class(name: str) -> Any:
    import diffusers

    if name in SUITABLE:
        return getattr(diffusers, name)
    if not (name.endswith("Scheduler") and hasattr(diffusers, name)):
        raise UserError(f"spec.sampler.scheduler: diffusers has no {name}{did_you_mean(name, SUITABLE)}")
    raise UserError(
        f"spec.sampler.scheduler: {name} does not suit: a scheduler over the teacher's discrete timesteps is needed, "
        f"with noise that can be derived per sample; use one of {', '.join(SUITABLE)}"
    )


def _check_options(sampler: DiffusersSampler, entries: set[str], step_parameters: set[str]) -> None:
    allowed = (entries - TRAINED_WITH) | (STEP_OPTIONS & step_parameters)
    for key in sampler.options:
        if key in entries & TRAINED_WITH:
            raise UserError(
                f"spec.sampler.options.{key}: this says what the teacher was trained on; correct it in the teacher's "
                "scheduler/scheduler_config.json, so that it becomes part of the teacher's identity"
            )
        if key not in allowed:
            hint = did_you_mean(key, sorted(allowed))
            raise UserError(f"spec.sampler.options.{key}: {sampler.scheduler} has no such option{hint}")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """``; did you mean A, B?`` with the closest words, or all of them if none is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)]
    return f"; did you mean {', '.join(close)}?" if close else f"; there are {', '.join(known)}"
