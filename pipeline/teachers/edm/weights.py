"""A network and its weights put together: every name, shape and dtype is checked, or nothing is loaded."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.errors import UserError
from pipeline.teachers.edm.folder import EdmFolder
from pipeline.teachers.edm.preconditioning import EdmNetwork


def read_network(folder: EdmFolder) -> EdmNetwork:
    """The network of a folder, on the CPU, in float32.

    Raises:
        UserError: the weights are not whole, or of another network than the config says.
    """
    network = folder.empty_network()
    try:
        tensors = load_file(folder.weights)
    except SafetensorError as error:
        raise UserError(f"{folder.weights}: not whole ({error}); copy or convert it again") from None
    load_weights(folder.stored(network), tensors, folder.kind, folder.weights)
    return network


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], kind: str, where: Path) -> None:
    """Give a network without weights those of a file, which it takes over.

    Args:
        network: on the meta device.
        tensors: its weights by name, float32.
        kind: what it is called, for messages.
        where: their file, for messages.

    Raises:
        UserError: they are of another network; the first that differs is named.
    """
    expected = network.state_dict()
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
            raise UserError(f"{where}: {name} is {tensor.dtype}, not torch.float32; save the network in float32")
    network.load_state_dict(tensors, assign=True)
