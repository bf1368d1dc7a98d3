"""A small dataset of a Stable Diffusion teacher: what its config says."""

from support.tiny_sd import TOKENS
from support.toy import toy_config

from configs.schema import StableDiffusionTeacherConfig

LONG = "x" * (TOKENS - 1)
PROMPTS = ["a red circle", "a blue square", "a green triangle", LONG, "a yellow circle"]
PAIRS_PER_PROMPT, SEED, NEGATIVE = 3, 7, "ugly"
IDS = list(range(len(PROMPTS) * PAIRS_PER_PROMPT))
DDIM = {"name": "diffusers", "scheduler": "DDIMScheduler", "steps": 3}
ANCESTRAL = {"name": "diffusers", "scheduler": "EulerAncestralDiscreteScheduler", "steps": 3}


def sd_config(output, folder, sd, *, dtype="float32", **sections):
    """15 pairs of five prompts, three of each, in shards of eight and batches of four, which cut both."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    spec = {
        "sampler": DDIM,
        "guidance_scale": 3.0,
        "negative_prompt": NEGATIVE,
        "pairs_per_prompt": PAIRS_PER_PROMPT,
        "seed": SEED,
        "fields": {"text_embedding": True},
    }
    sections["spec"] = {**spec, **sections.get("spec", {})}
    sections.setdefault("teacher", StableDiffusionTeacherConfig(path=str(sd), dtype=dtype))
    return toy_config(output, folder, **sections)
