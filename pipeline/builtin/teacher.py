"""Make the built-in teacher: an autoencoder, then UNet and text encoder on its latents.

    autoencoder     mean |x - decode(z)| + kl_weight mean KL(q(z | x) || N(0, I)),  z ~ q(z | x)
    text to image   mean |eps - eps_theta(alpha_t z + sigma_t eps, t, caption)|^2,  t uniform, z scaled to variance 1
                    (Ho et al. 2020, L_simple), the caption left out now and then (Ho & Salimans 2022)
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from configs.builtin_schema import BuiltinTeacherConfig
from pipeline.builtin.fit import fit
from pipeline.builtin.garments import Garments
from pipeline.builtin.networks import TextToImage, autoencoder, scheduler, tokenizer
from pipeline.builtin.randomness import generator

_SCALE_SAMPLES = 2048


def train_teacher(config: BuiltinTeacherConfig) -> Path:
    """Train what is not trained yet and write the pipeline, weights in float16.

    Returns:
        The diffusers pipeline folder, ``output/teacher``.

    Raises:
        UserError: the data is missing, or a checkpoint is of another network.
    """
    garments = Garments(config.data, "train", config.seed)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config.output.mkdir(parents=True, exist_ok=True)
    vae = _train_autoencoder(config, garments, device)
    tokens = tokenizer(config.output / "tokenizer")
    networks = _train_text_to_image(config, garments, vae, tokens, device)
    folder = config.output / "teacher"
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=networks.text_encoder,
        tokenizer=tokens,
        unet=networks.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to("cpu", torch.float16).save_pretrained(folder)
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
    fit(vae, loss, config.autoencoder, checkpoint, config.save_every_steps)
    latents = _encode(vae, garments.batch(0, _SCALE_SAMPLES).images.to(device), config.seed, -1)
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
    return vae.requires_grad_(False)


def _train_text_to_image(
    config: BuiltinTeacherConfig, garments: Garments, vae: AutoencoderKL, tokens: CLIPTokenizer, device: torch.device
) -> TextToImage:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        networks = TextToImage(tokens).to(device)
    alphas = scheduler().alphas_cumprod.to(device)
    size = config.text_to_image.batch_size

    def loss(step: int) -> Tensor:
        batch = garments.batch(step, size)
        draws = generator(config.seed, "text to image", step)
        empty = torch.rand(size, generator=draws) < config.empty_prompt_probability
        captions = ["" if left_out else caption for left_out, caption in zip(empty, batch.captions, strict=True)]
        ids = tokens(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        z = _encode(vae, batch.images.to(device), config.seed, step) * vae.config.scaling_factor
        eps = torch.randn(z.shape, generator=draws).to(device)
        t = torch.randint(len(alphas), (size,), generator=draws).to(device)
        alpha_squared = alphas[t][:, None, None, None]
        x_t = alpha_squared.sqrt() * z + (1 - alpha_squared).sqrt() * eps
        return (networks(x_t, t, ids) - eps).square().mean()

    checkpoint = config.output / "text_to_image.pt"
    fit(networks, loss, config.text_to_image, checkpoint, config.save_every_steps)
    return networks


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: Tensor, seed: int, step: int) -> Tensor:
    posterior = vae.encode(images).latent_dist
    return posterior.mean + posterior.std * _normal(posterior.mean, seed, "encode", step)


def _normal(like: Tensor, seed: int, purpose: str, step: int) -> Tensor:
    return torch.randn(like.shape, generator=generator(seed, purpose, step)).to(like.device)
