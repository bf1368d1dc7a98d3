"""The autoencoder of a Stable Diffusion pipeline, from images to the teacher's x0; nothing else of it is loaded.

    x0 = latent_scale * (mean of the encoder's distribution - shift)

The inverse of :meth:`StableDiffusionTeacher.decode`, as far as an autoencoder has one. The mean and not a draw: the
same image has the same latent.
"""

import torch
from torch import Tensor

from configs.encode_schema import LatentSpace
from configs.errors import UserError
from configs.schema import StableDiffusionTeacherConfig
from pipeline.teachers.digest import weights_digest, without_volatile
from pipeline.teachers.folder import latent_scale, open_folder
from pipeline.teachers.stable_diffusion import read_network, vae_dtype


def identify_latents(config: StableDiffusionTeacherConfig, image_size: int) -> LatentSpace:
    """Which latents an autoencoder makes of images of so many pixels. No network is built.

    Raises:
        UserError: the folder is missing, incomplete or not of the family, or no latent has a whole size.
    """
    folder = open_folder(config)
    settings = folder.config("vae")
    factor = 2 ** (len(settings["block_out_channels"]) - 1)
    if image_size % factor:
        raise UserError(f"spec.image_size: {image_size} is not a multiple of {factor}, which the autoencoder needs")
    return LatentSpace(
        weights_digest=weights_digest({"vae": folder.weights("vae")}, {"vae": without_volatile(settings)}),
        dtype=config.dtype,
        latent_scale=latent_scale(folder),
        sample_shape=(settings.get("latent_channels", 4), image_size // factor, image_size // factor),
    )


class LatentEncoder:
    """A frozen encoder on a device.

    Args:
        config: where the pipeline lies, and the precision of the call.
        device: where to put it.

    Raises:
        UserError: the folder is missing, incomplete or not of the family.
    """

    def __init__(self, config: StableDiffusionTeacherConfig, device: torch.device) -> None:
        from diffusers import AutoencoderKL

        folder = open_folder(config)
        dtype = vae_dtype(folder, getattr(torch, config.dtype))
        self._vae: AutoencoderKL = read_network(AutoencoderKL, folder, "vae", dtype)
        self._vae.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Latents of images.

        Args:
            images: (B, 3, H, W), float32 in [-1, 1].

        Returns:
            x0, (B, C, h, w), float32, on the encoder's device.
        """
        mean = self._vae.encode(images.to(self._vae.device, self._vae.dtype)).latent_dist.mean.float()
        settings = self._vae.config
        return (mean - (settings.shift_factor or 0.0)) * settings.scaling_factor
