"""A network and its weights put together: every name, shape and dtype is checked, or nothing is loaded."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import UserError
from pipeline.teachers.edm.folder import EdmArchitecture, EdmFolder
from pipeline.teachers.edm.networks import EdmNetwork


def read_network(folder: EdmFolder) -> EdmNetwork:
    """The network of a folder, on the CPU, in float32.

    Raises:
        UserError: the weights are not whole, or of another network than the config says.
    """
    try:
        tensors = load_file(folder.weights)
    except SafetensorError as error:
        raise UserError(f"{folder.weights}: not whole ({error}); copy or convert it again") from None
    return build(folder.architecture, tensors, folder.weights)


def build(architecture: EdmArchitecture, tensors: Mapping[str, Tensor], where: Path) -> EdmNetwork:
    """The network of an architecture with these weights, which it takes over.

    Args:
        architecture: what it is.
        tensors: its weights by name, float32.
        where: their file, for messages.

    Raises:
        UserError: there can be no such network, or they are of another one; the first that differs is named.
    """
    try:
        with torch.device("meta"):
            network = EdmNetwork(architecture)
    except ValueError as error:
        raise UserError(f"{where}: there is no such network: {error}") from None
    _check(tensors, network.state_dict(), architecture.architecture, where)
    network.load_state_dict(tensors, assign=True)
    return network


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str, where: Path) -> None:
    other = f"{where}: another network than the {kind} it should be"
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        first = [f"no {missing[0]}"] if missing else []
        raise UserError(f"{other}: {'; '.join(first + [f'{name} is not of it' for name in extra[:1]])}")
    for name, tensor in sorted(tensors.items()):
        shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
        if shape != wanted:
            raise UserError(f"{other}: {name} has shape {shape}, not {wanted}")
        if tensor.dtype != torch.float32:
            raise UserError(f"{where}: {name} is {tensor.dtype}, not torch.float32")
