"""From published checkpoints to the folder of an EDM teacher, once: safetensors and JSON, nothing that runs.

    NVIDIA's .pkl     edm-cifar10-32x32-{cond,uncond}-vp.pkl, edm-imagenet-64x64-cond-adm.pkl, or any other that
                      training of the same code wrote: EDMPrecond around a SongUNet as DDPM++, or a DhariwalUNet
    OpenAI's .pt      edm_imagenet64_ema.pt of the consistency models: the same ADM network under other names

Names, shapes and dtypes are those of the network that the file says it is, or the file is refused with the first that
are not. What a network without augmentation has no use for is left out: ``map_augment``, and the constant
``resample_filter``, which must be the filter that the network here has built in.
"""

import zipfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import UserError
from pipeline.teachers.edm.architecture import WEIGHTS, EdmArchitecture, write_architecture
from pipeline.teachers.edm.inert_pickle import RecordedModule, read_pickle, read_tensors
from pipeline.teachers.edm.networks import empty_network
from pipeline.teachers.edm.openai_names import openai_tensors
from pipeline.teachers.edm.weights import load_weights

OPENAI = EdmArchitecture(
    architecture="adm",
    img_resolution=64,
    label_dim=1000,
    model_channels=192,
    channel_mult=(1, 2, 3, 4),
    num_blocks=3,
    attn_resolutions=(32, 16, 8),
    noise_scale=1000.0,
)
"""The network of edm_imagenet64_ema.pt, whose file has its weights alone."""

_OUTER = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data")
"""Arguments of EDMPrecond, in order."""
_INNER: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "channel_mult_emb": 4,
        "num_blocks": 4,
        "attn_resolutions": [16],
    },
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "channel_mult_emb": 4,
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
}
"""Arguments of either network that shape it, and what they are where they are not given."""
_KINDS = {"SongUNet": "ddpm++", "DhariwalUNet": "adm"}
_ONLY = {
    "sigma_min": 0,
    "sigma_max": float("inf"),
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
"""Arguments that have to be what they are in DDPM++ and ADM."""
_WITHOUT_EFFECT = frozenset({"use_fp16", "augment_dim", "dropout", "label_dropout"})
"""Arguments that say how it was trained, or in what precision it was to be run."""


def convert(source: Path, folder: Path) -> EdmArchitecture:
    """Convert a checkpoint.

    Args:
        source: the .pkl or .pt file.
        folder: where to; missing or empty. Nothing is written unless all is well.

    Returns:
        What is in it.

    Raises:
        UserError: the file is missing, cut short, hostile or of another network; or the folder is in use.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {folder} exists already; name a new folder")
    if not source.is_file():
        raise UserError(f"{source}: there is no such file")
    architecture, tensors = _openai(source) if zipfile.is_zipfile(source) else _nvidia(source)
    load_weights(empty_network(architecture, source), tensors, architecture.architecture, source)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_architecture(architecture, folder)
    return architecture


def _nvidia(source: Path) -> tuple[EdmArchitecture, dict[str, Tensor]]:
    content = read_pickle(source)
    network = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(network, RecordedModule):
        raise UserError(f"{source}: has no network under 'ema', as the published files have")
    if network.class_name != "EDMPrecond":
        raise UserError(f"{source}: its network is a {network.class_name}; only EDMPrecond is an EDM teacher")
    try:
        arguments, tensors = network.arguments(_OUTER), network.tensors()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source}: its EDMPrecond is not made as that of EDM ({error}); copy it again") from None
    architecture = _architecture(arguments, source)
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".resample_filter"):
            if tensor.shape != (1, 1, 2, 2) or not (tensor == 0.25).all():
                raise UserError(f"{source}: {name} is another filter than [1, 1]")
        elif name != "model.map_augment.weight":
            kept[name] = tensor
    return architecture, kept


def _architecture(arguments: dict[str, Any], source: Path) -> EdmArchitecture:
    kind = arguments.pop("model_type", "DhariwalUNet")
    if kind not in _KINDS:
        raise UserError(f"{source}: its model_type is {kind!r}, not {' or '.join(_KINDS)}")
    for name, only in _ONLY.items():
        if (value := arguments.pop(name, only)) != only:
            raise UserError(f"{source}: its {name} is {value!r}; only {only!r} is an EDM teacher here")
    shape = {name: arguments.pop(name, default) for name, default in _INNER[kind].items()}
    outer = {name: arguments.pop(name) for name in _OUTER if name in arguments and name not in _WITHOUT_EFFECT}
    if unknown := arguments.keys() - _WITHOUT_EFFECT:
        raise UserError(f"{source}: its network was made with an unknown argument, {min(map(str, unknown))}")
    try:
        return EdmArchitecture.model_validate({"architecture": _KINDS[kind], **outer, **shape})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{source}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _openai(source: Path) -> tuple[EdmArchitecture, dict[str, Tensor]]:
    return OPENAI, openai_tensors(read_tensors(source), OPENAI, source)
