"""Read the pickles that NVIDIA's networks are published as, without running anything in them.

A pickle is a program: it names functions and classes, and calls them. These files moreover carry the source code of the
classes that they are objects of, to be executed by whoever loads them. What is wanted of them is in them as plain data:

    module   the name of its class, the arguments that it was made with, its parameters, buffers and sub-modules
    tensor   a block of bytes with dtype, shape and strides

So every name that the program may ask for is in a table of ours, which gives it a recorder that keeps the data and does
nothing else: no code of the file is executed, no class of another package is made, and any other name ends the reading.
The bytes of tensors are in an older format of PyTorch's own, whose restricted reader (``weights_only``) takes them.

*Not* assumed: that the file is what it says, or whole.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError

PERSISTENCE_VERSION = 6
"""Version of the persistence of NVIDIA's classes that the published files have."""
_MAX_DEPTH = 16
"""Sub-modules within sub-modules; a network has four levels, one that contains itself has no end."""
_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")


@dataclass(frozen=True)
class RecordedModule:
    """A module of the file.

    Attributes:
        class_name: of its class, in whatever source code the file carries.
        attributes: what was in its ``__dict__``.
    """

    class_name: str
    attributes: dict[str, Any]

    def arguments(self, positional: tuple[str, ...]) -> dict[str, Any]:
        """What it was made with, by name; ``positional`` names those that may have been given without one."""
        return dict(zip(positional, self.attributes["_init_args"], strict=False)) | self.attributes["_init_kwargs"]

    def tensors(self, depth: int = 0) -> dict[str, Tensor]:
        """Parameters and buffers by name, those of sub-modules with the usual prefix.

        Raises:
            ValueError: it has no parameters where modules have them, or no end.
        """
        if depth > _MAX_DEPTH:
            raise ValueError("its modules are nested without an end")
        found: dict[str, Tensor] = {}
        for table in ("_parameters", "_buffers"):
            for name, tensor in self.attributes[table].items():
                if tensor is not None:
                    found[name] = _expect(tensor, Tensor)
        for name, module in self.attributes["_modules"].items():
            if module is not None:
                inner = _expect(module, RecordedModule).tensors(depth + 1)
                found |= {f"{name}.{inner_name}": tensor for inner_name, tensor in inner.items()}
        return found


def read_pickle(path: Path) -> object:
    """The content of a file: plain values, tensors and :class:`RecordedModule`.

    Raises:
        UserError: it is no pickle, cut short, or asks for anything that a network does not need.
    """
    try:
        with path.open("rb") as file:
            return _InertUnpickler(file).load()
    except _RefusedError as refused:
        raise UserError(f"{path}: refused, and nothing of it was run: {refused}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can end in any of them, and so can a torch storage
        raise UserError(f"{path}: not a whole pickle of a network ({type(error).__name__}); copy it again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file that ``torch.save`` wrote, on the CPU, by torch's own restricted reader.

    Raises:
        UserError: it is cut short, or holds anything besides.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path}: not a whole file of tensors alone ({str(error).splitlines()[0][:200]}); copy it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: holds something else than named tensors")
    return state


class _RefusedError(Exception):
    pass


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in _KNOWN:
            raise _RefusedError(f"it asks for {name}, which a network does not need")
        return _KNOWN[name]

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("it refers to objects outside of the file")


class _Function:
    """What stands for a function: can be called, and nothing else."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("it changes a function")


class _ModuleDict:
    """What stands for torch's container of named modules, while it is being read."""

    __slots__ = ("_modules",)

    def __setstate__(self, state: Any) -> None:
        self._modules = RecordedModule("ModuleDict", _expect(state, dict))

    @staticmethod
    def recorded(value: Any) -> Any:
        return value._modules if isinstance(value, _ModuleDict) else value


class _NumpyType:
    """What stands for a numpy dtype: one number of a few bytes."""

    __slots__ = ("code",)

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _NUMBERS:
            raise _RefusedError(f"it has a number of type {code!r}")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if _expect(state, tuple)[1] not in ("<", "|", "="):
            raise _RefusedError("it has a number in big-endian order")


def _module(meta: dict[str, Any]) -> RecordedModule:
    """NVIDIA's persistence: ``meta`` also has the source code, which is left where it is."""
    if (meta["type"], meta["version"]) != ("class", PERSISTENCE_VERSION):
        raise _RefusedError(f"it has a {meta['type']} of persistence version {meta['version']}")
    attributes = {
        key: {name: _ModuleDict.recorded(inner) for name, inner in value.items()} if key == "_modules" else value
        for key, value in _expect(meta["state"], dict).items()
    }
    return RecordedModule(_expect(meta["class_name"], str), attributes)


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage; torch refuses one that reaches beyond it."""
    return torch.as_strided(_expect(storage, Tensor), size, stride, offset).clone()


def _parameter(data: Any, *_: Any) -> Tensor:
    return _expect(data, Tensor)


def _storage(content: bytes) -> Tensor:
    """The numbers of a storage, (N,), in its dtype."""
    loaded = torch.load(io.BytesIO(_expect(content, bytes)), map_location="cpu", weights_only=True)
    storage = _expect(loaded, torch.storage.TypedStorage)
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)  # untyped() warns of what is meant here


def _number(kind: Any, content: bytes) -> int | float | bool:
    return np.frombuffer(content, f"<{_expect(kind, _NumpyType).code}")[0].item()


def _latin_bytes(text: str, encoding: str) -> bytes:
    """How bytes are written in protocol 2."""
    if encoding != "latin1":
        raise _RefusedError(f"it has bytes in the encoding {encoding!r}")
    return _expect(text, str).encode("latin1")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__} in the place of a {kind.__name__}")
    return value


_KNOWN: dict[str, Any] = {
    "builtins.set": set,
    "__builtin__.set": set,
    "collections.OrderedDict": dict,
    "dnnlib.util.EasyDict": dict,
    "_codecs.encode": _Function(_latin_bytes),
    "numpy.dtype": _Function(_NumpyType),
    "numpy.core.multiarray.scalar": _Function(_number),
    "numpy._core.multiarray.scalar": _Function(_number),
    "torch._utils._rebuild_parameter": _Function(_parameter),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch.storage._load_from_bytes": _Function(_storage),
    "torch.nn.modules.container.ModuleDict": _ModuleDict,
    "torch_utils.persistence._reconstruct_persistent_obj": _Function(_module),
}
"""Every name that a file may ask for -> what it gets. Types are built in, or have slots alone: a file cannot change
them."""
