"""CLIP scores and CLIP features, by any network of open_clip's.

    clip     = <f(image), g(prefix + prompt)> / (|f| |g|)          the plain cosine, not clipped and not times 100
    features = f(image)                                            as the image tower gives it, of any length

f and g are open_clip's ``encode_image`` of its own inference preprocessing and ``encode_text`` of its own tokens, in
float32. A prompt too long for the text tower loses its end, without a word, as it does in open_clip.

This is the only scorer that imports open_clip. Weights are safetensors, or are unpickled as tensors and nothing else.

References:
    Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020.
    Hessel et al. 2021, CLIPScore, arXiv 2104.08718, whose score is 2.5 max(clip, 0).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import JsonValue
from torch import Tensor
from torch.nn import functional

from configs.errors import UserError, did_you_mean
from configs.evaluate_schema import ClipScorerConfig, OpenClipConfig, OpenClipFeaturesConfig
from pipeline.scoring.resizing import batch_of, middle_square
from pipeline.teachers.builtin import JUDGE
from pipeline.teachers.digest import canonical_json

_TOKENIZER_FILES = ("merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json")


class OpenClipNetwork:
    """Both towers of an open_clip network, frozen.

    Args:
        config: which network and weights.
        device: where to run it.

    Attributes:
        identity: what decides its features.
        width: of its features.

    Raises:
        UserError: there is no such network, or its weights are not there, cannot be downloaded or do not fit.
    """

    def __init__(self, config: OpenClipConfig, device: torch.device) -> None:
        import open_clip

        name = _open_clip_name(config)
        weights = _weights(config)
        try:
            with torch.random.fork_rng(devices=[]):  # it draws weights before it is given any
                self._model, self._preprocess = open_clip.create_model_from_pretrained(name, weights, device=device)
            self._tokenizer = open_clip.get_tokenizer(name)
        except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
            cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"model: {config.model} with weights {weights} cannot be loaded ({cause})") from error
        self._model.eval().requires_grad_(False)
        self._device = device
        self._size = config.resize
        self.width = self.encode_images([np.zeros((8, 8, 3), np.uint8)]).shape[1]
        self.identity: dict[str, JsonValue] = {
            "model": config.model.partition(":")[0] if name.startswith("local-dir:") else name,
            "weights_digest": _digest(self._model, open_clip.get_model_config(name), name),
            "resize": config.resize,
            "dtype": "float32",
        }

    @torch.no_grad()
    def encode_images(self, images: list[NDArray[np.uint8]]) -> Tensor:
        """Features of B pictures, each (H, W, 3): (B, width), float32, not normalized."""
        return self._model.encode_image(batch_of(images, self._prepared).to(self._device)).float()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features of B texts: (B, width), float32, not normalized."""
        return self._model.encode_text(self._tokenizer(list(texts)).to(self._device)).float()

    def _prepared(self, image: NDArray[np.uint8]) -> Tensor:
        return self._preprocess(Image.fromarray(middle_square(image, self._size)))


class ClipScorer:
    """A scorer with one column, ``clip``: cosine similarity of image and prompt.

    Args:
        config: the network, and the prefix of prompts.
        device: where to run it.

    Raises:
        UserError: as :class:`OpenClipNetwork`.
    """

    def __init__(self, config: ClipScorerConfig, device: torch.device) -> None:
        self._network = OpenClipNetwork(config, device)
        self._prefix = config.prefix
        self.columns: dict[str, int | None] = {"clip": None}
        self.identity: dict[str, JsonValue] = {
            "kind": config.kind,
            **self._network.identity,
            "prefix": config.prefix,
        }

    def __call__(self, images: list[NDArray[np.uint8]], prompts: list[str]) -> dict[str, NDArray[np.float32]]:
        """The CLIP score of each image with its prompt."""
        image_features = self._network.encode_images(images)
        text_features = self._network.encode_texts([self._prefix + prompt for prompt in prompts])
        cosines = (functional.normalize(image_features, dim=-1) * functional.normalize(text_features, dim=-1)).sum(-1)
        return {"clip": cosines.cpu().numpy()}


class OpenClipFeatures:
    """A scorer with one column, ``features``: the image tower's output.

    Args:
        config: the network.
        device: where to run it.

    Raises:
        UserError: as :class:`OpenClipNetwork`.
    """

    def __init__(self, config: OpenClipFeaturesConfig, device: torch.device) -> None:
        self._network = OpenClipNetwork(config, device)
        self.columns: dict[str, int | None] = {"features": self._network.width}
        self.identity: dict[str, JsonValue] = {"kind": config.kind, **self._network.identity}

    def __call__(self, images: list[NDArray[np.uint8]], prompts: list[str]) -> dict[str, NDArray[np.float32]]:
        """Features of each image; prompts do not matter."""
        return {"features": self._network.encode_images(images).cpu().numpy()}

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Features of B texts in the same space, (B, width), for :mod:`pipeline.scoring.zero_shot`."""
        return self._network.encode_texts(texts).cpu().numpy()


def _open_clip_name(config: OpenClipConfig) -> str:
    """The model in open_clip's own words, checked as far as that is cheap."""
    import open_clip

    if config.model == "builtin":
        return f"local-dir:{JUDGE}"
    if config.model.startswith("local-dir:"):
        folder = Path(config.model.removeprefix("local-dir:")).expanduser()
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"model: {folder} has no open_clip_config.json; give a folder in open_clip's own layout")
        return f"local-dir:{folder.resolve()}"
    names = open_clip.list_models()
    if not config.model.startswith("hf-hub:") and config.model not in names:
        hint = did_you_mean(config.model, names)
        raise UserError(f"model: open_clip has no {config.model!r}{hint}; open_clip.list_models() has all")
    return config.model


def _weights(config: OpenClipConfig) -> str | None:
    """A tag of open_clip's, or a file."""
    import open_clip

    if config.weights is None:
        return None
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    path = Path(config.weights).expanduser()
    if config.weights not in tags and not path.is_file():
        raise UserError(
            f"weights: {config.weights!r} is no file, and no tag of {config.model}{did_you_mean(config.weights, tags)}"
            f"; it has {', '.join(tags) or 'none'}"
        )
    return config.weights if config.weights in tags else str(path)


def _digest(model: Any, model_config: Any, name: str) -> str:
    """sha256 over the towers' config, the preprocessing, a local tokenizer's files, and every tensor as it is used."""
    folder = Path(name.removeprefix("local-dir:"))
    files = [folder / file for file in _TOKENIZER_FILES] if name.startswith("local-dir:") else []
    tokenizer = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    digest = hashlib.sha256(canonical_json([model_config, model.visual.preprocess_cfg, tokenizer]))
    for tensor_name, tensor in sorted(model.state_dict().items()):
        digest.update(canonical_json([tensor_name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
