"""Named tensors in a safetensors file, and a network's weights among them.

A file is taken only if its names, shapes and dtypes are those of the network it is for: nothing is skipped, nothing is
cast. The first that differs is named.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from configs.errors import UserError
from pipeline.safetensors_errors import system_errors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device; those that are not on the CPU are copied there, all of a file at once.

    Raises:
        OSError: the disk is full, or the system has another reason.
    """
    from safetensors.torch import save_file

    with system_errors(path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def tensor_names(path: Path) -> set[str]:
    """The names of the tensors in a file.

    Raises:
        UserError: it is not there, or no such file.
    """
    from safetensors import safe_open

    with _reading(path), safe_open(path, framework="pt") as file:
        return set(file.keys())


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a file to the CPU that must hold tensors like ``expected``: the same names, shapes and dtypes.

    Returns:
        Views of the file itself, which change when it does: copy what is to be kept.

    Raises:
        UserError: it is not there or no such file, or a name, shape or dtype differs: the first one, in the order of
            ``expected``.
    """
    from safetensors.torch import load_file

    with _reading(path):
        tensors = load_file(path)
    for name, like in expected.items():
        if name not in tensors:
            raise UserError(f"{path}: has no tensor {name}; it is not of this network")
        found = tensors[name]
        if (found.shape, found.dtype) != (like.shape, like.dtype):
            raise UserError(f"{path}: {name} is {_kind(found)}, not {_kind(like)}; it is not of this network")
    if beyond := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"{path}: {beyond[0]} is not a tensor of this network")
    return tensors


def load_network(path: Path, network: nn.Module) -> None:
    """Load the weights of a network, in place, from what :func:`write_tensors` made of its ``state_dict()``.

    Raises:
        UserError: see :func:`read_tensors`; the network is as it was.
    """
    network.load_state_dict(read_tensors(path, network.state_dict()))


@contextmanager
def _reading(path: Path) -> Generator[None]:
    from safetensors import SafetensorError

    if not path.is_file():
        raise UserError(f"{path}: missing; it was not among what was saved")
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or damaged ({error})") from None


def _kind(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape)) or 'a scalar'} {str(tensor.dtype).removeprefix('torch.')}"
