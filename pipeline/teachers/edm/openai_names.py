"""ADM under the names of guided-diffusion, which OpenAI's consistency models have too.

The networks are one and the same, walked in the same order; what differs is where blocks are counted from, and the
order of the channels in the attention's first convolution: (3, heads, c) there, (heads, c, 3) here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from configs.errors import UserError
from pipeline.teachers.edm.architecture import EdmArchitecture
from pipeline.teachers.edm.networks import HEAD_CHANNELS, Block, empty_network
from pipeline.teachers.edm.preconditioning import EdmNetwork

_RESIDUAL = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
_OUTSIDE = {
    "map_layer0": "time_embed.0",
    "map_layer1": "time_embed.2",
    "map_label": "label_emb",
    "out_norm": "out.0",
    "out_conv": "out.2",
}


def openai_tensors(state: Mapping[str, Tensor], architecture: EdmArchitecture, where: Path) -> dict[str, Tensor]:
    """The weights of an ADM network by the names they have here.

    Args:
        state: by the names of guided-diffusion.
        architecture: what the network is.
        where: the file, for messages.

    Raises:
        UserError: a name is missing, or one is left over.
    """
    network = empty_network(architecture, where)
    left, tensors = dict(state), {}
    for ours, theirs in names(network):
        if theirs not in left:
            raise UserError(
                f"{where}: another network than OpenAI's ADM: no {theirs}, but {min(left, default='nothing')}"
            )
        tensors[ours] = _arranged(ours, left.pop(theirs))
    if left:
        raise UserError(f"{where}: another network than OpenAI's ADM: {min(left)} is not of it")
    return tensors


def names(network: EdmNetwork) -> Iterator[tuple[str, str]]:
    """(our name, their name) of every parameter."""
    blocks = dict(_blocks(network))
    for ours, _ in network.named_parameters():
        module, _, parameter = ours.rpartition(".")
        place, _, layer = module.removeprefix("model.").rpartition(".")
        if place in blocks:
            residual, attention = blocks[place]
            theirs = f"{residual}.{_RESIDUAL[layer]}" if layer in _RESIDUAL else f"{attention}.{_ATTENTION[layer]}"
        else:
            theirs = _OUTSIDE.get(layer, "input_blocks.0.0")
        yield ours, f"{theirs}.{parameter}"


def _blocks(network: EdmNetwork) -> Iterator[tuple[str, tuple[str, str]]]:
    """Our name of a block -> their names of its residual part and of its attention."""
    for count, (name, layer) in enumerate(network.model.enc.items()):
        if isinstance(layer, Block):
            yield f"enc.{name}", (f"input_blocks.{count}.0", f"input_blocks.{count}.1")
    count = -1
    last: nn.Module | None = None
    for name, layer in network.model.dec.items():
        if name.endswith("_in0"):
            yield f"dec.{name}", ("middle_block.0", "middle_block.1")
        elif name.endswith("_in1"):
            yield f"dec.{name}", ("middle_block.2", "")
        elif name.endswith("_up"):  # they count it to the level that it leads out of
            yield f"dec.{name}", (f"output_blocks.{count}.{2 if hasattr(last, 'qkv') else 1}", "")
        else:
            count += 1
            yield f"dec.{name}", (f"output_blocks.{count}.0", f"output_blocks.{count}.1")
        last = layer


def _arranged(name: str, tensor: Tensor) -> Tensor:
    """A tensor with its dimensions in our order."""
    if name.endswith("map_label.weight"):
        return tensor.T.contiguous()
    if ".qkv." in name and len(tensor) % (3 * HEAD_CHANNELS) == 0:
        return tensor.unflatten(0, (3, -1, HEAD_CHANNELS)).movedim(0, 2).flatten(0, 2).contiguous()
    return tensor.contiguous()
