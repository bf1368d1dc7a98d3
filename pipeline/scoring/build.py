"""From what a user wrote to the scorer it means; each kind is one module, imported when it is asked for."""

from typing import TYPE_CHECKING

from configs.evaluate_schema import (
    ClipScorerConfig,
    InceptionFeaturesConfig,
    OpenClipFeaturesConfig,
    ScorerConfig,
    TorchscriptFeaturesConfig,
)
from pipeline.scoring.scorer import Scorer

if TYPE_CHECKING:
    import torch


def build_scorer(config: ScorerConfig, device: "torch.device") -> Scorer:
    """Load a scorer.

    Raises:
        UserError: its weights are not there, or not those it needs.
    """
    match config:
        case ClipScorerConfig():
            from pipeline.scoring.open_clip_scorer import ClipScorer

            return ClipScorer(config, device)
        case OpenClipFeaturesConfig():
            from pipeline.scoring.open_clip_scorer import OpenClipFeatures

            return OpenClipFeatures(config, device)
        case InceptionFeaturesConfig():
            from pipeline.scoring.inception import InceptionFeatures

            return InceptionFeatures(config, device)
        case TorchscriptFeaturesConfig():
            from pipeline.scoring.torchscript import TorchscriptFeatures

            return TorchscriptFeatures(config, device)
