"""The state of AdamW as named tensors: ``{parameter name}.{exp_avg | exp_avg_sq | step}``.

PyTorch numbers an optimizer's parameters and pickles its state. Here each tensor carries the name of the parameter it
belongs to, so that a file can be read without unpickling and cannot be given to the wrong parameter.

Only the state is kept, not the hyperparameters: these are the configuration's, and the learning rate is a function of
the step. A parameter that has never had a gradient has no state, and no names here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_KEYS = ("step", "exp_avg", "exp_avg_sq")


def state_tensors(optimizer: Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The state of an AdamW over parameters of ``network``, each tensor by its name. Not copies."""
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in network.named_parameters()
        if optimizer.state.get(parameter)
        for key in _KEYS
    }


def expected_tensors(names: set[str], network: nn.Module) -> dict[str, Tensor]:
    """What the tensors called ``names`` must look like: moments as their parameters, steps float32 scalars.

    A parameter takes part if any of its tensors does, and then with all of them.
    """
    step = torch.empty((), dtype=torch.float32)
    return {
        f"{name}.{key}": step if key == "step" else parameter
        for name, parameter in network.named_parameters()
        if any(f"{name}.{key}" in names for key in _KEYS)
        for key in _KEYS
    }


def load_state_tensors(optimizer: Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make ``tensors``, as :func:`state_tensors` gave them, the state of an optimizer; what it had is forgotten.

    The optimizer's own hyperparameters stay. The tensors are copied, to the device of their parameter (``step`` to
    where this kind of AdamW keeps it).
    """
    names = {parameter: name for name, parameter in network.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {key: tensors[f"{names[parameter]}.{key}"].clone() for key in _KEYS}
        for number, parameter in enumerate(parameters)
        if f"{names[parameter]}.step" in tensors
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
