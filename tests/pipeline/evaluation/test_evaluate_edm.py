"""An EDM teacher is measured and timed as any other: its prompts are numbers, and a sentence would be no class."""

import json

import numpy as np
from support import tiny_clip, tiny_edm
from support.pictures import pictures, save_pictures

from configs.evaluate_schema import EvaluateConfig
from pipeline.class_labels import draw_labels
from pipeline.evaluation.evaluate import evaluate
from pipeline.prompts import PromptTable
from pipeline.shards.layout import PROMPTS
from pipeline.shards.storage import Storage


def test_systems_are_timed_and_drawn_with_classes(tmp_path):
    tiny_edm.build(tmp_path / "teacher")
    tiny_edm.build(tmp_path / "student", one_step_sigma=80.0)
    tiny_clip.build(tmp_path / "judge")
    save_pictures(tmp_path / "real", pictures(12, 16, 16))
    output = tmp_path / "evaluation"
    config = {
        "output": str(output),
        "student": str(tmp_path / "student"),
        "teacher": {"kind": "edm", "path": str(tmp_path / "teacher")},
        "teacher_steps": [3],
        "sampler": {"name": "edm_heun"},
        "prompts": {"path": "classes"},
        "num_images": 12,
        "features": {"kind": "open_clip_features", "model": f"local-dir:{tmp_path / 'judge'}"},
        "reference": str(tmp_path / "real"),
        "allow_few_images": True,
        "latency": {"batch_sizes": [2], "warmup": 0, "repeats": 1},
        "grid_prompts": 2,
        "samples_per_shard": 6,
        "runtime": {"executor": "in-process", "batch_size": 6},
    }
    evaluate(EvaluateConfig.model_validate(config))
    systems = json.loads((output / "report.json").read_bytes())["systems"]
    assert [system["evaluations"] for system in systems] == [5, 1]  # Heun's last step is Euler's
    assert all(len(system["timings"]) == 1 for system in systems)
    assert all(np.isfinite(system["numbers"]["frechet_distance"]) for system in systems)
    assert PromptTable.open(Storage.open(str(output)), PROMPTS).rows(0, 12)[1] == list(draw_labels(10, 1, 12))
