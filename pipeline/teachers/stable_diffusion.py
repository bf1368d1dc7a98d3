"""The Stable Diffusion 1.x / 2.x family as a teacher.

    condition = text_encoder(tokenizer(prompt))                        (B, tokens, width)
    x0        = scheduler's loop over unet(x_t, t, condition)          (B, 4, h, w), latents times latent_scale
    image     = vae.decoder(x0 / latent_scale + shift)                 (B, 3, 8 h, 8 w)

The result is that of diffusers' StableDiffusionPipeline for the same latents, prompts, guidance and scheduler, with two
differences: scheduler arithmetic and guidance are float32 whatever the precision of the networks, and an autoencoder
whose config asks for it (``force_upcast``, the default of diffusers) decodes in float32 instead of float16.

*Not* loaded: safety checker, feature extractor, image encoder, and anything pickled.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import PairsSettings, SamplerConfig, StableDiffusionTeacherConfig, TeacherIdentity
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.guidance import guided
from pipeline.diffusion.parametrization import Parametrization
from pipeline.diffusion.schedules import VPSchedule
from pipeline.teachers.base import Teacher, calls_per_prediction
from pipeline.teachers.digest import weights_digest, without_volatile
from pipeline.teachers.folder import (
    PARAMETRIZATIONS,
    WEIGHTS,
    PipelineFolder,
    as_its_files_say,
    image_shape,
    latent_scale,
    open_folder,
    sample_shape,
)
from pipeline.teachers.schedulers import SchedulerLoop, check_sampler, sample_generators


def identify(config: StableDiffusionTeacherConfig) -> TeacherIdentity:
    """Look at the files, read them once, and say which teacher they are. No network is built.

    Raises:
        UserError: the folder is missing, incomplete or not of the family.
    """
    return _identity(open_folder(config), config)


def check(config: StableDiffusionTeacherConfig, settings: PairsSettings) -> None:
    """Raise UserError when these settings cannot be carried out with this teacher."""
    if settings.sampler.name != "diffusers":
        raise UserError(
            f"spec.sampler.name: {settings.sampler.name} is for teachers on the EDM schedule; this one is sampled with "
            "name: diffusers and a scheduler"
        )
    folder = open_folder(config)
    check_sampler(settings.sampler, folder.config("scheduler"), _schedule(folder))


def sampler_evaluations(config: StableDiffusionTeacherConfig, sampler: SamplerConfig, guidance_scale: float) -> int:
    """Network evaluations of one sample, for a sampler that :func:`check` has passed."""
    assert sampler.name == "diffusers"
    loop = SchedulerLoop(sampler, open_folder(config).config("scheduler"))
    return loop.num_predictions * calls_per_prediction(guidance_scale)


class StableDiffusionTeacher(Teacher):
    """A frozen Stable Diffusion pipeline.

    Args:
        config: where it lies, and the precision of its networks.
        device: where to put it.
        compile: torch.compile the UNet.
        channels_last: use the channels_last memory format in UNet and VAE.

    Raises:
        UserError: the folder is missing, incomplete or not of the family.
    """

    def __init__(
        self, config: StableDiffusionTeacherConfig, device: torch.device, *, compile: bool, channels_last: bool
    ) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        folder = open_folder(config)
        self.identity = _identity(folder, config)
        self.device = device
        dtype = getattr(torch, config.dtype)
        self._unet: UNet2DConditionModel = read_network(UNet2DConditionModel, folder, "unet", dtype)
        self._vae: AutoencoderKL = read_network(AutoencoderKL, folder, "vae", vae_dtype(folder, dtype))
        self._text_encoder: CLIPTextModel = read_network(CLIPTextModel, folder, "text_encoder", dtype)
        for network in (self._unet, self._vae, self._text_encoder):
            network.requires_grad_(False).eval().to(device)
        with as_its_files_say(folder.path / "tokenizer"):
            self._tokenizer = CLIPTokenizer.from_pretrained(folder.path / "tokenizer", local_files_only=True)
        self._scheduler_config = folder.config("scheduler")
        self._loop: SchedulerLoop | None = None
        self._schedule = _schedule(folder)
        self._parametrization = _parametrization(folder)
        if channels_last:
            self._unet.to(memory_format=torch.channels_last)
            self._vae.to(memory_format=torch.channels_last)
        self._forward = torch.compile(self._unet) if compile else self._unet

    @property
    def denoiser(self) -> Denoiser:
        """The UNet; the condition is a text embedding, (B, tokens, width)."""
        network = partial(self.call, self._forward)
        return Denoiser(network, self._schedule, self._parametrization, network_dtype=self._unet.dtype)

    @staticmethod
    def call(network: Callable[..., Any], x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Evaluate a UNet of diffusers."""
        return network(x_t, t, encoder_hidden_states=condition, return_dict=False)[0]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings of the encoder's last layer, (B, tokens, width), float32."""
        length = self._tokenizer.model_max_length
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        # Stable Diffusion was trained with the padding in sight; the few encoders that were not say so.
        masked = getattr(self._text_encoder.config, "use_attention_mask", False)
        return self._text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0].float()

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Whether each prompt has more tokens than the text encoder takes (77 for CLIP, two of them marks)."""
        length = self._tokenizer.model_max_length
        token_ids: list[list[int]] = self._tokenizer(list(prompts), max_length=length + 1, truncation=True).input_ids
        return [len(ids) > length for ids in token_ids]

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
        """Run a diffusers scheduler; the guided quantity is the network's own prediction, eps or v."""
        assert sampler.name == "diffusers"
        network = self.denoiser.predict

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return guided(network, x_t, t, condition, unconditional, guidance_scale)

        if self._loop is None or self._loop.sampler != sampler:
            self._loop = SchedulerLoop(sampler, self._scheduler_config, self.device)
        return self._loop(predict, noise, sample_generators(seed, sample_ids))

    def decode(self, x0: Tensor) -> Tensor:
        """Undo the latent scale and run the VAE's decoder."""
        config = self._vae.config
        latent = x0 / config.scaling_factor + (config.shift_factor or 0.0)
        return self._vae.decode(latent.to(self._vae.dtype), return_dict=False)[0].float()

    def enable_gradient_checkpointing(self) -> None:
        """Block by block of the VAE's decoder."""
        self._vae.enable_gradient_checkpointing()

    @contextmanager
    def float32(self) -> Iterator[None]:
        """Every network in float32; half precision widens and narrows without loss, so the weights come back.

        The UNet runs as it is, not compiled: to compile it again for a sample or two would take longer than they do.
        """
        networks: list[nn.Module] = [self._unet, self._vae, self._text_encoder]
        dtypes = [self._unet.dtype, self._vae.dtype, self._text_encoder.dtype]
        forward = self._forward
        try:
            self._forward = self._unet
            _cast(networks, [torch.float32] * len(networks))
            yield
        finally:
            _cast(networks, dtypes)
            self._forward = forward


def _identity(folder: PipelineFolder, config: StableDiffusionTeacherConfig) -> TeacherIdentity:
    with as_its_files_say(folder.path):
        return TeacherIdentity(
            kind=config.kind,
            weights_digest=weights_digest({part: folder.weights(part) for part in WEIGHTS}, _settings(folder)),
            dtype=config.dtype,
            parametrization=_parametrization(folder),
            schedule=_schedule(folder).description,
            latent_scale=latent_scale(folder),
            sample_shape=sample_shape(folder),
            image_shape=image_shape(folder),
        )


def _cast(networks: Sequence[nn.Module], dtypes: Sequence[torch.dtype]) -> None:
    # Within a caller's inference mode the new weights would be inference tensors, unfit for training ever after.
    with torch.inference_mode(False), torch.no_grad():
        for network, dtype in zip(networks, dtypes, strict=True):
            nn.Module.to(network, dtype)  # diffusers' own `to` warns of lost precision, which a way back does not lose


def read_network(kind: Any, folder: PipelineFolder, part: str, dtype: torch.dtype) -> Any:
    """A network with all of its weights from the folder: the libraries would make up those that are missing.

    Raises:
        UserError: some are missing, or of another shape, or the config describes no network.
    """
    hide_progress_bars()
    with as_its_files_say(folder.path / part):
        network, report = kind.from_pretrained(
            folder.path,
            subfolder=part,
            variant=folder.variant,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if mismatched := sorted(map(str, report.get("mismatched_keys", ()))):
        raise UserError(f"{folder.path / part}: {len(mismatched)} weights do not fit, {mismatched[0]}; copy it again")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder.path / part}: {len(missing)} weights are missing, {missing[0]} is one; copy it again")
    return network


def hide_progress_bars() -> None:
    """Loading takes seconds, and a bar for each part says nothing to whoever reads a log."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def vae_dtype(folder: PipelineFolder, dtype: torch.dtype) -> torch.dtype:
    """Precision of the autoencoder where the other networks have ``dtype``: some overflow in float16, and say so."""
    upcast = folder.config("vae").get("force_upcast", True)
    return torch.float32 if dtype == torch.float16 and upcast else dtype


def _parametrization(folder: PipelineFolder) -> Parametrization:
    return PARAMETRIZATIONS[folder.config("scheduler").get("prediction_type", "epsilon")]


def _schedule(folder: PipelineFolder) -> VPSchedule:
    try:
        return VPSchedule.from_diffusers(folder.config("scheduler"))
    except ValueError as error:
        raise UserError(f"{folder.path / 'scheduler' / 'scheduler_config.json'}: {error}") from None


def _settings(folder: PipelineFolder) -> dict[str, Any]:
    """Everything besides weights that shapes the output.

    The whole scheduler config counts, not only its betas: samplers start from it.
    """
    settings: dict[str, Any] = {part: without_volatile(folder.config(part)) for part in (*WEIGHTS, "scheduler")}
    files = folder.tokenizer_files()
    settings["tokenizer"] = {n: without_volatile(f) if isinstance(f, dict) else f for n, f in files.items()}
    return settings
