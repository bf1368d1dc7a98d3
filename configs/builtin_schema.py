"""What a user may write to make the built-in teacher and its judge anew."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from configs.schema import Model


class FitConfig(Model):
    """How long and how fast one network is trained: AdamW, a linear warm-up, then a cosine to zero."""

    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt
    """Garments a step."""
    learning_rate: PositiveFloat
    """Highest learning rate."""
    warmup_steps: NonNegativeInt = 100
    """Steps until it is reached."""


class BuiltinConfig(Model):
    """What making the teacher and making the judge have in common."""

    output: Path
    """Folder for checkpoints while training, and for the result. The same folder again goes on where it stopped."""
    data: Path
    """Folder with the four files of Fashion-MNIST, such as train-images-idx3-ubyte.gz."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Root of all randomness."""
    device: str | None = None
    """Torch device; None takes a GPU if there is one."""
    save_every_steps: PositiveInt = 250
    """Steps between checkpoints; at most so many are lost by a kill."""


class BuiltinTeacherConfig(BuiltinConfig):
    """``stages/train_builtin_teacher.py``: a miniature of Stable Diffusion on tinted garments."""

    autoencoder: FitConfig
    """Training of the KL autoencoder, first."""
    text_to_image: FitConfig
    """Training of UNet and text encoder together, on its latents."""
    kl_weight: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the Kullback-Leibler term, a mean over latents as the reconstruction is one over pixels."""
    empty_prompt_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How often a caption is left out, so that the teacher can be guided."""


class SmallEdmTeacherConfig(BuiltinConfig):
    """``stages/train_edm_teacher.py``: a small DDPM++ on the same garments as they are, grey on black."""

    fit: FitConfig
    """Its training."""
    conditional: bool = True
    """Tell the network the class. Off: an unconditional teacher."""
    model_channels: Annotated[int, Field(ge=4, multiple_of=2)] = 16
    """Channels of the first level, before its multiplier."""
    channel_mult: tuple[PositiveInt, ...] = (1, 2, 2)
    """Multiplier of model_channels at each level."""
    num_blocks: PositiveInt = 1
    """Residual blocks of a level."""
    attn_resolutions: tuple[PositiveInt, ...] = (8,)
    """Heights at which blocks have self-attention."""
    log_sigma_mean: float = -1.2
    """Mean of log(sigma) over the training (EDM's P_mean)."""
    log_sigma_std: PositiveFloat = 1.2
    """Its standard deviation (P_std)."""


class BuiltinJudgeConfig(BuiltinConfig):
    """``stages/train_builtin_judge.py``: a small open_clip model of the same garments and captions."""

    contrastive: FitConfig
    """Training of both towers."""
