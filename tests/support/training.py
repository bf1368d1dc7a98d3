"""A training run of seconds: a tiny Stable Diffusion teacher, its pairs, and a student of the same network."""

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from configs.schema import GeneratePairsConfig
from configs.train_schema import TrainConfig
from pipeline.generate import generate_pairs
from tests.support import tiny_sd

GUIDANCE_SCALE = 3.0
NUM_PAIRS = 64


def make_pairs(folder: Path, **teacher: int) -> Path:
    """A teacher in ``folder/teacher`` and 64 pairs of sixteen prompts in eight shards in ``folder/pairs``.

    Args:
        folder: where to.
        teacher: width and sample_size of its network, if not the smallest.
    """
    tiny_sd.build(folder / "teacher", **teacher)
    (folder / "prompts.txt").write_text("".join(f"photo {i}\n" for i in range(16)))
    generate_pairs(
        GeneratePairsConfig.model_validate(
            {
                "output": str(folder / "pairs"),
                "teacher": {"kind": "stable_diffusion", "path": str(folder / "teacher")},
                "prompts": {"path": str(folder / "prompts.txt")},
                "spec": {
                    "sampler": {"name": "diffusers", "scheduler": "DDIMScheduler", "steps": 3},
                    "guidance_scale": GUIDANCE_SCALE,
                    "pairs_per_prompt": NUM_PAIRS // 16,
                },
                "layout": {"samples_per_shard": 8},
                "runtime": {"executor": "in-process", "batch_size": 8},
            }
        )
    )
    return folder / "pairs"


def train_settings(folder: Path, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run on what :func:`make_pairs` made; ``sections`` override whole entries.

    Two micro-batches of four samples and two pairs a step, everything on: average, guidance, clipping, warm-up.
    """
    settings: dict[str, Any] = {
        "output": str(output),
        "teacher": {"kind": "stable_diffusion", "path": str(folder / "teacher")},
        "data": {"pairs": str(folder / "pairs"), "holdout": 4, "shuffle_window": 2},
        "student": {"ema_decay": 0.9},
        "loss": {"guidance_scale": GUIDANCE_SCALE, "regression": "l2", "regression_space": "latent"},
        "optimizer": {"lr": 1e-3, "warmup_steps": 4, "max_grad_norm": 1.0},
        "batch": {"dm": 8, "regression": 4},
        "runtime": {
            "steps": 4,
            "micro_batch": 4,
            "workers": 0,
            "log_every": 2,
            "grid_every": 100,
            "grid_samples": 2,
            "checkpoint_every": 100,
            "trackers": [],
        },
    }
    for section, entries in sections.items():
        settings[section] = {**settings.get(section, {}), **entries} if isinstance(entries, dict) else entries
    return settings


def train_config(folder: Path, output: Path, **sections: dict[str, Any]) -> TrainConfig:
    """The same, validated."""
    return TrainConfig.model_validate(train_settings(folder, output, **sections))


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    """The same as a YAML file for the command line."""
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key != "output"}))
    return path


def tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by file and name: networks, average, both optimizers."""
    folder = run_dir / "checkpoints" / f"step_{step:07d}"
    return {
        f"{path.stem}/{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
