"""The networks that look at images, and the tables they make: one for each network beside each system's images.

A network is loaded here first, before anything is drawn: weights that are missing are found missing then, and tables
are named after what the network is. Other weights under the same path make other tables.

Where workers are in this process, they use the network loaded here. It must not be loaded beside a pipeline: while
diffusers and transformers load a model, every module that another thread makes is left without weights.
"""

import hashlib
from functools import cache, partial

import torch
from pydantic import JsonValue

from configs.evaluate_schema import EvaluateConfig, ScorerConfig
from configs.schema import WorkersRuntime
from configs.score_schema import ScoreRuntime
from pipeline.driver import StopRequest
from pipeline.followed_worker import MakeFollower
from pipeline.scoring.build import build_scorer
from pipeline.scoring.score_shards import score_shards, with_absolute_paths
from pipeline.scoring.score_table import shards_without_table
from pipeline.scoring.score_worker import MakeScorer, ScoreWorker
from pipeline.scoring.scorer import Scorer
from pipeline.shards.dataset import Dataset
from pipeline.shards.manifest import read_commits
from pipeline.teachers.digest import canonical_json


class Scores:
    """Makes the tables that an evaluation needs.

    Args:
        config: of the evaluation.

    Attributes:
        features: name of the tables of features.
        clip: name of the tables of CLIP scores; None when they are not asked for.
        identities: name of tables -> what decides their values.
        device: where a network runs that is loaded in this process.

    Raises:
        UserError: a network or its weights are not there.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        shared = {name: getattr(config.runtime, name) for name in WorkersRuntime.model_fields}
        self._runtime = ScoreRuntime(**shared)  # where systems are drawn they are scored
        has_gpu = config.runtime.gpus_per_actor > 0 and torch.cuda.is_available()
        self.device = torch.device("cuda" if has_gpu else "cpu")
        self._configs: dict[str, ScorerConfig] = {}
        self.identities: dict[str, dict[str, JsonValue]] = {}
        self._load = cache(partial(build_scorer, device=self.device))
        self.features = self._named(config.features)
        self.clip = self._named(config.clip) if config.clip is not None else None

    def _named(self, config: ScorerConfig) -> str:
        """Load a network, and name its tables."""
        config = with_absolute_paths(config)
        identity = self._load(config).identity
        name = f"{config.kind}_{hashlib.sha256(canonical_json(identity)).hexdigest()[:8]}"
        self._configs[name], self.identities[name] = config, identity
        return name

    def scorer(self, name: str) -> Scorer:
        """A network in this process."""
        return self._load(self._configs[name])

    def let_go(self) -> None:
        """Forget the networks where the workers, which are elsewhere, have their own."""
        if self._runtime.executor != "in-process":
            self._load.cache_clear()

    def followers(self) -> list[MakeFollower]:
        """Build what makes the tables of a shard; for :func:`pipeline.generate.generate_pairs`."""
        return [
            partial(ScoreWorker, name=name, make_scorer=self._maker(name), runtime=self._runtime)
            for name in self._configs
        ]

    def make(self, dataset: Dataset, stop: StopRequest | None = None) -> None:
        """Make every table that a dataset lacks. Raises as :func:`pipeline.scoring.score_shards.score_shards`."""
        for name in self._configs:
            self.make_one(dataset, name, stop)

    def make_one(self, dataset: Dataset, name: str, stop: StopRequest | None = None) -> None:
        """Make the tables of one name that a dataset lacks."""
        commits = read_commits(dataset)
        if not commits or shards_without_table(dataset, name, commits):
            score_shards(dataset, name, self._maker(name), self._runtime, stop)

    def _maker(self, name: str) -> MakeScorer:
        if self._runtime.executor == "in-process":
            return lambda device: self.scorer(name)
        return partial(build_scorer, self._configs[name])
