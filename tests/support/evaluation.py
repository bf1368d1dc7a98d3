"""An evaluation of seconds: a tiny teacher, a student of other weights, a tiny judge, real images from a generator."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from support import tiny_clip, tiny_sd
from support.pictures import pictures, save_pictures

from configs.evaluate_schema import EvaluateConfig
from configs.schema import StableDiffusionTeacherConfig
from pipeline import teachers

PROMPTS = ["a red bag", "a blue bag", "a red coat", "a blue coat", "a tea cup", "a tea pot"]
PER_PROMPT = 4
NUM_IMAGES = PER_PROMPT * len(PROMPTS)


def make_world(folder: Path) -> Path:
    """``teacher/``, ``student/`` (an export), ``judge/``, ``real/`` (images), ``prompts.txt`` and ``labels.csv``."""
    tiny_sd.build(folder / "teacher")
    tiny_sd.build(folder / "other", seed=1)
    tiny_clip.build(folder / "judge")
    weights = load_file(folder / "other/unet/diffusion_pytorch_model.safetensors")
    teacher = StableDiffusionTeacherConfig(path=str(folder / "teacher"))
    teachers.save_student(teacher, weights, folder / "student", timestep=999)
    save_pictures(folder / "real", pictures(40, 16, 16))
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = [(prompt, *prompt.split()[1:]) for prompt in PROMPTS]
        csv.writer(file).writerows([("caption", "first", "second"), *rows])
    return folder


def settings(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """24 images of each of three systems in three shards, every measurement on; ``changes`` replace whole entries."""
    judge = f"local-dir:{world / 'judge'}"
    return {
        "output": str(output),
        "student": str(world / "student"),
        "teacher": {"kind": "stable_diffusion", "path": str(world / "teacher")},
        "teacher_steps": [3, 1],
        "prompts": {"path": str(world / "prompts.txt")},
        "images_per_prompt": PER_PROMPT,
        "features": {"kind": "open_clip_features", "model": judge},
        "reference": str(world / "real"),
        "clip": {"model": judge},
        "labels": str(world / "labels.csv"),
        "latency": {"batch_sizes": [1, 4], "warmup": 0, "repeats": 2},
        "grid_prompts": 4,
        "samples_per_shard": 8,
        "runtime": {"executor": "in-process", "batch_size": 4, "lease_period_s": 0.2},
        **changes,
    }


def config(world: Path, output: Path, **changes: Any) -> EvaluateConfig:
    """The same, validated."""
    return EvaluateConfig.model_validate(settings(world, output, **changes))


def real_features(world: Path) -> np.ndarray:
    """Features of the real images by open_clip alone."""
    import open_clip
    import torch
    from PIL import Image

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{world / 'judge'}")
    pictures = [preprocess(Image.open(path)) for path in sorted((world / "real").iterdir())]
    with torch.no_grad():
        return model.eval().encode_image(torch.stack(pictures)).numpy()
