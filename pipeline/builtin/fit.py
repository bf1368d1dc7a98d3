"""Train a module: deterministic, and resumable at any checkpoint.

    AdamW (betas 0.9, 0.99), lr(step) = peak * min(step / warmup, 1) * cosine to 0, gradient norm clipped to 1
    average <- d average + (1 - d) weights after every step, d = min(AVERAGE, (1 + step) / (10 + step))
    running statistics of batch normalisation are the last ones

The loss of a step is a function of the weights and of the step alone, so that a training that was killed and started
again ends in the same bits, on the same machine and number of threads.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from configs.builtin_schema import FitConfig
from configs.errors import RunStopped, UserError
from configs.fingerprint import differences

AVERAGE = 0.999
"""Decay of the running average of the weights, once it is warm."""
_REPORT_EVERY = 50


def fit(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    config: FitConfig,
    checkpoint: Path,
    save_every_steps: int,
    settings: Mapping[str, JsonValue] | None = None,
) -> None:
    """Train, or go on training, ``module`` in place; it ends with the average of its weights, in eval mode.

    Args:
        module: on its device, with the weights it starts from.
        loss: step -> the scalar to make small, of ``module`` as it is now.
        config: how long and how fast.
        checkpoint: the file to go on from and to write.
        save_every_steps: between two checkpoints.
        settings: what decides the loss besides ``config``; a training that was begun with others is not gone on with.

    Raises:
        UserError: the checkpoint is of another network, or was begun with other settings.
        RunStopped: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(module.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = deepcopy(module)
    parts = {"module": module, "average": average, "optimizer": optimizer}
    recipe: dict[str, JsonValue] = {**config.model_dump(), **(settings or {})}
    start = _restore(parts, checkpoint, recipe)
    module.train()
    since, losses = time.monotonic(), []
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(step, config)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        _follow(average, module, min(AVERAGE, (1 + step) / (10 + step)))
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise RunStopped(f"{checkpoint.stem}: the loss of step {step} is {losses[-1]}; lower learning_rate")
        done = step + 1
        if done % _REPORT_EVERY == 0 or done == config.steps:
            pace = len(losses) / (time.monotonic() - since)
            print(
                f"{checkpoint.stem} {done}/{config.steps}  loss {sum(losses) / len(losses):.5f}  {pace:.2f} steps/s",
                flush=True,
            )
            since, losses = time.monotonic(), []
        if done % save_every_steps == 0 or done == config.steps:
            _save(
                {"step": done, "recipe": recipe, **{name: part.state_dict() for name, part in parts.items()}},
                checkpoint,
            )
    module.load_state_dict(average.state_dict())
    module.eval()


def _rate(step: int, config: FitConfig) -> float:
    warm = min((step + 1) / (config.warmup_steps + 1), 1.0)
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


@torch.no_grad()
def _follow(average: nn.Module, module: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for old, new in zip(average.buffers(), module.buffers(), strict=True):
        old.copy_(new)  # batch normalisation's, averages already


def _restore(
    parts: dict[str, nn.Module | torch.optim.Optimizer], checkpoint: Path, recipe: dict[str, JsonValue]
) -> int:
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if differing := differences(state["recipe"], recipe):
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, old, new in differing)
        raise UserError(f"{checkpoint}: begun with other settings ({listed}); restore them, or choose another output")
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError):
            raise UserError(f"{checkpoint}: is of another network; remove it or choose another output") from None
    return state["step"]


def _save(state: dict[str, object], checkpoint: Path) -> None:
    aside = checkpoint.with_suffix(".partial")
    with aside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(checkpoint)
