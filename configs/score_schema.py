"""What a user may write to score the pairs of a dataset, and to select some of them."""

from typing import Annotated, Self

import tyro
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from configs.evaluate_schema import ClipScorerConfig, ScorerConfig
from configs.schema import Model, WorkersRuntime

ScoreName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
"""A folder below ``scores/``, and a name in the expressions of select_pairs.py."""


class ScoreRuntime(WorkersRuntime):
    """How images are scored. Changes values by rounding only: change any of it between two runs."""

    batch_size: PositiveInt = 64
    """Images of one call of the scorer."""
    cache_dir: str | None = None
    """Node-local folder for shards of remote datasets; None is a folder in the system's temporary folder."""
    cache_gb: PositiveFloat = 20.0
    """Its largest size, in GB; shards used longest ago go first."""


class ScorePairsConfig(Model):
    """Measure the image of every pair and keep the values beside the shards. The same command again resumes."""

    root: tyro.conf.Positional[str]
    """Dataset root."""
    name: ScoreName = "clip"
    """Name of the scores: the folder ROOT/scores/NAME. Scores of another scorer need another name."""
    scorer: ScorerConfig = ClipScorerConfig()
    """What is measured."""
    runtime: ScoreRuntime = ScoreRuntime()
    """How it is computed."""


class SelectPairsConfig(Model):
    """Write which pairs of a dataset a training is to use. No shard is touched."""

    root: tyro.conf.Positional[str]
    """Dataset root."""
    output: str
    """The selection to write: a path or URI that ends in .parquet."""
    where: str = ""
    """Which pairs, such as "clip > 0.28 and guidance_scale == 3": columns of the index and of scores/ (clip.clip where
    a name alone is ambiguous), ==, !=, <, <=, >, >=, in, not in, and, or, not. Empty: all."""
    dedupe_prompts: bool = False
    """Keep only the first of the pairs that share a prompt."""
    limit: PositiveInt | None = None
    """Keep at most so many, the first ones, or with sample_seed some at random."""
    sample_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """With limit: which ones. A larger limit of the same seed holds those of a smaller one."""

    @model_validator(mode="after")
    def _seed_needs_limit(self) -> Self:
        if self.sample_seed is not None and self.limit is None:
            raise ValueError("sample_seed says which pairs of a limit are kept; give limit too")
        return self
