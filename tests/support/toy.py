"""A toy dataset: small enough for tests, made by the same code as a large one."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from configs.schema import GeneratePairsConfig
from pipeline.shards.members import split_members

PROMPTS = ["a red circle", "a blue square", "a green triangle", "a yellow circle", "a red square"]


def toy_config(output: Path | str, folder: Path, **sections: dict[str, Any]) -> GeneratePairsConfig:
    """40 pairs of five prompts in shards of eight, made in this process; ``sections`` override whole entries.

    Args:
        output: root of the dataset.
        folder: where the prompt file is written.
        sections: entries of ``teacher``, ``prompts``, ``spec``, ``layout`` or ``runtime`` to replace.
    """
    source = folder / "prompts.txt"
    if not source.exists():
        source.write_text("\n".join(PROMPTS) + "\n")
    config: dict[str, Any] = {
        "output": str(output),
        "teacher": {"kind": "mixture", "image_size": 8},
        "prompts": {"path": str(source)},
        "spec": {
            "sampler": {"name": "edm_heun", "steps": 4},
            "pairs_per_prompt": 8,
            "seed": 7,
            "fields": {"x0": "pixels"},
        },
        "layout": {"samples_per_shard": 8},
        "runtime": {"executor": "in-process", "batch_size": 4, "lease_period_s": 0.2},
    }
    for section, entries in sections.items():
        config[section] = {**config[section], **entries} if isinstance(entries, dict) else entries
    return GeneratePairsConfig.model_validate(config)


def files(root: Path) -> dict[str, bytes]:
    """Every file below a root by relative path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def shard_bytes(root: Path) -> dict[str, bytes]:
    """The tars of a dataset by name: what must be identical between two runs."""
    return {path.name: path.read_bytes() for path in sorted((root / "shards").glob("*.tar"))}


def samples(root: Path) -> dict[str, tuple[dict[str, bytes], dict[str, Any]]]:
    """Members and index row of every stored sample, by key."""
    found = {}
    for path in sorted((root / "commits").glob("*.json")):
        commit = json.loads(path.read_bytes())
        tar = (root / commit["path"]).read_bytes()
        for row in pq.read_table(root / commit["index_path"]).to_pylist():
            if row["status"] == "ok":
                found[row["key"]] = (split_members(tar[row["offset"] : row["offset"] + row["length"]]), row)
    return found
