"""The networks that ship: small, without pickles, and of the asked garment in the asked colour."""

import open_clip
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch.nn import functional

from pipeline.builtin.captions import COLOURS, GARMENTS, names
from pipeline.teachers.builtin import JUDGE, TEACHER

LARGEST = 12_000_000
"""Bytes of both together, so that a clone stays quick."""


def test_together_they_are_small_and_nothing_in_them_can_run_code():
    files = [path for folder in (TEACHER, JUDGE) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    assert {path.suffix for path in files} == {".json", ".md", ".npz", ".safetensors"}
    assert {path.parent for path in files if path.suffix == ".md"} == {TEACHER, JUDGE}


@pytest.fixture(scope="module")
def drawn():
    """Each garment in a colour of its own, then in another: images in [0, 1], (20, 3, 32, 32), and indices of names."""
    pipeline = StableDiffusionPipeline.from_pretrained(TEACHER).to(torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    count = len(GARMENTS)
    chosen = [len(COLOURS) * garment + (garment + turn) % len(COLOURS) for turn in (0, 3) for garment in range(count)]
    latents = torch.randn(len(chosen), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipeline(
        [names()[i] for i in chosen], latents=latents, num_inference_steps=20, guidance_scale=2.0, output_type="pt"
    ).images
    return images, torch.tensor(chosen)


def test_the_judge_finds_in_the_teachers_pictures_what_was_asked_for(drawn):
    images, chosen = drawn
    judge, _, _ = open_clip.create_model_and_transforms(f"local-dir:{JUDGE}")
    judge.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{JUDGE}")
    with torch.no_grad():
        texts = functional.normalize(judge.encode_text(tokens(names())), dim=-1)
        found = (functional.normalize(judge.encode_image(2 * images - 1), dim=-1) @ texts.T).argmax(-1)
    colours_right = (found % len(COLOURS) == chosen % len(COLOURS)).double().mean()
    garments_right = (found // len(COLOURS) == chosen // len(COLOURS)).double().mean()
    assert colours_right >= 0.95
    assert garments_right >= 0.8  # shirts, pullovers and coats are told apart with less certainty
