"""The networks that look at images, and the tables they make: one for each network beside each system's images.

In this process a network is loaded once for all systems, and before anything is drawn: while diffusers and transformers
load a model, every module that another thread makes is left without weights.
"""

from functools import cache, partial

import torch

from configs.evaluate_schema import ClipScorerConfig, EvaluateConfig, ScorerConfig
from configs.fingerprint import fingerprint
from configs.schema import WorkersRuntime
from configs.score_schema import ScoreRuntime
from pipeline.driver import StopRequest
from pipeline.scoring.build import build_scorer
from pipeline.scoring.score_shards import score_shards
from pipeline.scoring.score_table import ScorerRecord, read_record
from pipeline.scoring.score_worker import MakeScorer
from pipeline.scoring.scorer import Scorer
from pipeline.shards.dataset import Dataset


def score_name(scorer: ScorerConfig) -> str:
    """Name of the tables that a scorer's config makes: another config never meets them."""
    return f"{scorer.kind}_{fingerprint(scorer)[:8]}"


class Scores:
    """Makes the tables that an evaluation needs.

    Args:
        config: of the evaluation.

    Attributes:
        features: name of the tables of features.
        clip: name of the tables of CLIP scores; None when they are not asked for.
        device: where a network runs that is loaded in this process.

    Raises:
        UserError: a network or its weights are not there.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._configs: dict[str, ScorerConfig] = {score_name(config.features): config.features}
        self.features = score_name(config.features)
        self.clip = None
        if isinstance(config.clip, ClipScorerConfig):
            self.clip = score_name(config.clip)
            self._configs[self.clip] = config.clip
        shared = {name: getattr(config.runtime, name) for name in WorkersRuntime.model_fields}
        self._runtime = ScoreRuntime(**shared)  # where systems are drawn they are scored
        has_gpu = config.runtime.gpus_per_actor > 0 and torch.cuda.is_available()
        self.device = torch.device("cuda" if has_gpu else "cpu")
        self.scorer = cache(self._load)
        if self._runtime.executor == "in-process":
            for name in self._configs:
                self.scorer(name)

    def _load(self, name: str) -> Scorer:
        """A network in this process; loaded at the first call for it."""
        return build_scorer(self._configs[name], self.device)

    def make(self, dataset: Dataset, stop: StopRequest | None = None) -> None:
        """Make every table that a dataset lacks. Raises as :func:`pipeline.scoring.score_shards.score_shards`."""
        for name in self._configs:
            self.make_one(dataset, name, stop)

    def make_one(self, dataset: Dataset, name: str, stop: StopRequest | None = None) -> None:
        """Make the tables of one name."""
        score_shards(dataset, name, self._maker(name), self._runtime, stop)

    def records(self, dataset: Dataset) -> list[ScorerRecord]:
        """Who made the tables of a dataset."""
        return [read_record(dataset, name) for name in self._configs]

    def _maker(self, name: str) -> MakeScorer:
        if self._runtime.executor == "in-process":
            return lambda device: self.scorer(name)
        return partial(build_scorer, self._configs[name])
