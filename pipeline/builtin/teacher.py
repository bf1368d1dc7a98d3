"""Make the built-in teacher: an autoencoder, then UNet and text encoder on its latents.

autoencoder     mean |x - decode(z)| + kl_weight mean KL(q(z | x) || N(0, I)),  z ~ q(z | x)
text to image   mean |eps - eps_theta(alpha_t z + sigma_t eps, t, caption)|^2,  t uniform, z scaled to variance 1
                (Ho et al. 2020, L_simple), the caption left out now and then (Ho & Salimans 2022)
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from configs.builtin_schema import BuiltinTeacherConfig
from pipeline.builtin.card import write_card
from pipeline.builtin.fit import fit
from pipeline.builtin.garments import Garments
from pipeline.builtin.networks import TextToImage, autoencoder, scheduler, tokenizer
from pipeline.builtin.randomness import generator
from pipeline.teachers.stable_diffusion import hide_progress_bars

_SCALE_SAMPLES = 2048
"""Garments whose latents say by what factor latents are scaled to variance 1."""
_TEST_IMAGES = 2000
_ABOUT = """A miniature of Stable Diffusion, of the same classes of diffusers and transformers: a KL autoencoder, a
CLIP text encoder of its own vocabulary, a UNet that predicts eps on Stable Diffusion's noise schedule. It makes
garments of 32x32 pixels in an asked colour, so that distillation can be tried in minutes, without a GPU or a network.
It knows nothing else."""


def train_teacher(config: BuiltinTeacherConfig) -> Path:
    """Train what is not trained yet and write the pipeline, weights in float16.

    Returns:
        The diffusers pipeline folder, ``output/teacher``.

    Raises:
        UserError: the data is missing, or a checkpoint is of another network, other settings or other data.
    """
    garments = Garments(config.data, "train", config.seed)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config.output.mkdir(parents=True, exist_ok=True)
    vae = _train_autoencoder(config, garments, device)
    tokens = tokenizer(config.output / "tokenizer")
    networks = _train_text_to_image(config, garments, vae, tokens, device)
    for part in (vae, networks):
        nn.Module.to(nn.Module.to(part, torch.float16), torch.float32)  # what is tried below is what is written
    metrics = _try(vae, networks, tokens, Garments(config.data, "test", config.seed), device)
    folder = config.output / "teacher"
    _write(vae, networks, tokens, folder)
    size = sum(weight.numel() for part in (vae, networks) for weight in part.parameters())
    write_card(folder, "The built-in teacher", _ABOUT, "train_builtin_teacher.py", config, metrics, size=size)
    print(json.dumps(metrics))
    return folder


def _train_autoencoder(config: BuiltinTeacherConfig, garments: Garments, device: torch.device) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):  # the libraries draw the first weights from the global generator
        torch.manual_seed(config.seed)
        vae = autoencoder().to(device)
    size = config.autoencoder.batch_size

    def loss(step: int) -> Tensor:
        images = garments.batch(step, size).images.to(device)
        posterior = vae.encode(images).latent_dist
        z = posterior.mean + posterior.std * _normal(posterior.mean, config.seed, "autoencoder", step)
        return (vae.decode(z).sample - images).abs().mean() + config.kl_weight * posterior.kl().mean() / z[0].numel()

    checkpoint = config.output / "autoencoder.pt"
    settings = config.model_dump(mode="json", include={"seed", "kl_weight"})
    settings["data"] = garments.digest
    fit(vae, loss, config.autoencoder, checkpoint, config.save_every_steps, settings)
    latents = _encode(vae, garments.batch(0, _SCALE_SAMPLES).images.to(device), config.seed, -1)
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
    return vae.requires_grad_(False)


def _train_text_to_image(
    config: BuiltinTeacherConfig, garments: Garments, vae: AutoencoderKL, tokens: CLIPTokenizer, device: torch.device
) -> TextToImage:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        networks = TextToImage(tokens).to(device)
    size = config.text_to_image.batch_size

    def loss(step: int) -> Tensor:
        batch = garments.batch(step, size)
        draws = generator(config.seed, "text to image", step)
        empty = torch.rand(size, generator=draws) < config.empty_prompt_probability
        captions = ["" if left_out else caption for left_out, caption in zip(empty, batch.captions, strict=True)]
        z = _encode(vae, batch.images.to(device), config.seed, step) * vae.config.scaling_factor
        return _denoising_loss(networks, z, captions, tokens, draws)

    checkpoint = config.output / "text_to_image.pt"
    settings = config.model_dump(mode="json", include={"seed", "kl_weight", "autoencoder", "empty_prompt_probability"})
    settings["data"] = garments.digest
    fit(networks, loss, config.text_to_image, checkpoint, config.save_every_steps, settings)
    return networks


def _denoising_loss(
    networks: TextToImage, z: Tensor, captions: list[str], tokens: CLIPTokenizer, draws: torch.Generator
) -> Tensor:
    """The mean over a batch of latents (B, 4, 8, 8), each at a time of its own."""
    alphas = scheduler().alphas_cumprod
    eps = torch.randn(z.shape, generator=draws).to(z.device)
    t = torch.randint(len(alphas), (len(z),), generator=draws)
    alpha_squared = alphas[t][:, None, None, None].to(z.device)
    x_t = alpha_squared.sqrt() * z + (1 - alpha_squared).sqrt() * eps
    ids = tokens(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return (networks(x_t, t.to(z.device), ids.to(z.device)) - eps).square().mean()


@torch.no_grad()
def _try(
    vae: AutoencoderKL, networks: TextToImage, tokens: CLIPTokenizer, test: Garments, device: torch.device
) -> dict[str, float]:
    """Both losses on garments that were not trained on."""
    batch = test.batch(0, min(_TEST_IMAGES, len(test)))
    images = batch.images.to(device)
    z = _encode(vae, images, 0, 0) * vae.config.scaling_factor
    restored = vae.decode(vae.encode(images).latent_dist.mean).sample
    return {
        "autoencoder, mean absolute error (of 2)": (restored - images).abs().mean().item(),
        "UNet, mean squared error of eps": _denoising_loss(
            networks, z, batch.captions, tokens, generator(0, "try", 0)
        ).item(),
    }


def _write(vae: AutoencoderKL, networks: TextToImage, tokens: CLIPTokenizer, folder: Path) -> None:
    """The folder as diffusers has it, weights in float16."""
    hide_progress_bars()
    for part in (vae, networks.text_encoder, networks.unet):
        nn.Module.to(part, "cpu", torch.float16)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=networks.text_encoder,
        tokenizer=tokens,
        unet=networks.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: Tensor, seed: int, step: int) -> Tensor:
    posterior = vae.encode(images).latent_dist
    return posterior.mean + posterior.std * _normal(posterior.mean, seed, "encode", step)


def _normal(like: Tensor, seed: int, purpose: str, step: int) -> Tensor:
    return torch.randn(like.shape, generator=generator(seed, purpose, step)).to(like.device)
