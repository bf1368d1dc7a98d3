"""An evaluation against what most people would write: a diffusers loop that fills a folder, then clean-fid over it.

Both draw the same number of images with the same pipeline and steps, save them as PNG, take the features of one random
network at clean-fid's 299 pixels, and end with a FID to the same statistics. Both are timed from loading the pipeline
to that number; ours writes its report besides. Ours draws and measures in one process, on two threads.
"""

import time
from pathlib import Path

import numpy as np
import torch
from cleanfid import fid
from torch import nn

from configs.evaluate_schema import EvaluateConfig
from pipeline.evaluation.evaluate import evaluate
from tests.support import tiny_sd

NUM_IMAGES = 384
BATCH_SIZE = 16
STEPS = 4
GUIDANCE_SCALE = 3.0
WIDTH = 256
"""Of the features."""


def bench_evaluating(folder: Path) -> dict[str, float]:
    """Images/s of both in turns, twice each; the better of two, as noise only ever slows down."""
    torch.set_num_threads(1)
    tiny_sd.build(folder / "teacher", width=16, sample_size=16)
    (folder / "prompts.txt").write_text("".join(f"photo {i}\n" for i in range(NUM_IMAGES)))
    torch.jit.script(_network()).save(folder / "network.pt")
    real = np.random.default_rng(0).standard_normal((WIDTH + 1, WIDTH)).astype(np.float32)
    np.savez(folder / "real.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False), count=len(real))
    for warm_up in (_plain, _ours):
        warm_up(folder, "warm-up", BATCH_SIZE)
    rates = [(_plain(folder, f"{i}", NUM_IMAGES), _ours(folder, f"{i}", NUM_IMAGES)) for i in range(2)]
    plain, ours = map(max, zip(*rates, strict=True))
    return {"plain loop and folder, images/s": plain, "evaluate, images/s": ours, "evaluate / plain": ours / plain}


def _network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=4),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(128, WIDTH, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ).eval()


def _plain(folder: Path, name: str, num_images: int) -> float:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    started = time.perf_counter()
    pipe = StableDiffusionPipeline.from_pretrained(folder / "teacher", safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    drawn = folder / f"plain-{name}"
    drawn.mkdir()
    prompts = (folder / "prompts.txt").read_text().splitlines()
    for start in range(0, num_images, BATCH_SIZE):
        batch = prompts[start : min(start + BATCH_SIZE, num_images)]
        for i, image in enumerate(pipe(batch, num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE).images):
            image.save(drawn / f"{start + i:06d}.png")
    network = torch.jit.load(folder / "network.pt").eval()
    features = fid.get_folder_features(
        str(drawn), network, num_workers=0, batch_size=64, device=torch.device("cpu"), verbose=False
    )
    with np.load(folder / "real.npz") as real:
        fid.frechet_distance(features.mean(0), np.cov(features, rowvar=False), real["mu"], real["sigma"])
    return num_images / (time.perf_counter() - started)


def _ours(folder: Path, name: str, num_images: int) -> float:
    config = EvaluateConfig.model_validate(
        {
            "output": str(folder / f"ours-{name}"),
            "teacher": {"kind": "stable_diffusion", "path": str(folder / "teacher")},
            "teacher_steps": [STEPS],
            "guidance_scale": GUIDANCE_SCALE,
            "prompts": {"path": str(folder / "prompts.txt")},
            "num_images": num_images,
            "features": {
                "kind": "torchscript_features",
                "path": str(folder / "network.pt"),
                "input_size": 299,
                "input_range": (0, 255),
            },
            "reference": str(folder / "real.npz"),
            "allow_few_images": True,
            "latency": None,
            "samples_per_shard": 64,
            "runtime": {"executor": "in-process", "batch_size": BATCH_SIZE},
        }
    )
    started = time.perf_counter()
    evaluate(config)
    return num_images / (time.perf_counter() - started)
