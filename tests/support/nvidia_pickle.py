"""Files as NVIDIA's persistence writes them: modules as (source code, class name, ``__dict__``), under its names.

The classes are stand-ins; the names in the pickle are those of the published files, which are not installed here.
"""

import sys
from collections import OrderedDict
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from pipeline.teachers.edm.architecture import EdmArchitecture


def _reconstruct_persistent_obj(meta: Any) -> None:
    raise AssertionError("the code in a file was about to be run")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Module:
    """One module, with as much of ``nn.Module.__dict__`` as a reader may look at."""

    def __init__(
        self,
        class_name: str,
        init_kwargs: Mapping[str, Any],
        tensors: Mapping[str, Any],
        modules: Mapping[str, "Module"],
        *,
        attributes: Mapping[str, Any] | None = None,
        source: str = "raise AssertionError",
        version: int = 6,
    ) -> None:
        parameters = {name: nn.Parameter(t) if isinstance(t, Tensor) else t for name, t in tensors.items()}
        is_buffer = {name: name == "resample_filter" for name in tensors}
        self.meta = {
            "type": "class",
            "version": version,
            "module_src": source,
            "class_name": class_name,
            "state": {
                "training": False,
                "_parameters": {name: p for name, p in parameters.items() if not is_buffer[name]},
                "_buffers": {name: tensors[name] for name in tensors if is_buffer[name]},
                "_non_persistent_buffers_set": set(),
                "_backward_hooks": OrderedDict(),
                "_modules": dict(modules),
                "_init_args": (),
                "_init_kwargs": dict(init_kwargs),
                **(attributes or {}),
            },
        }

    def __reduce__(self) -> Any:
        sys.modules.setdefault("torch_utils", ModuleType("torch_utils"))
        persistence = sys.modules.setdefault("torch_utils.persistence", ModuleType("torch_utils.persistence"))
        persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
        return _reconstruct_persistent_obj, (self.meta,)


def tree(class_name: str, init_kwargs: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Module:
    """Modules nested by the dots in the names of their tensors; dictionaries of blocks are torch's own."""
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = tensor
    modules: dict[str, Any] = {}
    for name, parts in inner.items():
        if name in ("enc", "dec"):
            container = nn.ModuleDict()
            for block in dict.fromkeys(part.partition(".")[0] for part in parts):
                of_block = {n.partition(".")[2]: t for n, t in parts.items() if n.startswith(f"{block}.")}
                container._modules[block] = tree("UNetBlock", {}, of_block)  # pyright: ignore[reportArgumentType]
            modules[name] = container
        else:
            modules[name] = tree("SongUNet" if name == "model" else "Linear", {}, parts)
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    return Module(class_name, init_kwargs, own, modules)


def init_kwargs(architecture: EdmArchitecture) -> dict[str, Any]:
    """What EDMPrecond was made with, as its training script gives it."""
    shape = {
        name: getattr(architecture, name)
        for name in ("img_resolution", "img_channels", "label_dim", "model_channels", "num_blocks")
    }
    ddpmpp = {
        "model_type": "SongUNet",
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
    }
    return {
        **shape,
        "channel_mult": list(architecture.channel_mult),
        "attn_resolutions": list(architecture.attn_resolutions),
        "use_fp16": False,
        "dropout": 0.13,
        **(ddpmpp if architecture.architecture == "ddpm++" else {"model_type": "DhariwalUNet"}),
    }
