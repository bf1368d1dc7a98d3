"""The stream of pairs: one dataset, or several mixed by weight, each going through its own epochs."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.train_schema import DataIdentity, TrainConfig
from pipeline.shards.mixture import Mixture
from pipeline.shards.pair_decoder import Target
from pipeline.shards.reader import PairBatch, PairReader


class PairStream:
    """The datasets of a run, opened.

    Args:
        config: a run with at least one dataset.

    Attributes:
        readers: of the datasets, in the order of the config.
        target: what the targets are, the same for all datasets.

    Raises:
        UserError: a dataset cannot be used, or does not go with the others or with the loss.
        DamagedRecord: the records of a dataset do not fit together.
    """

    def __init__(self, config: TrainConfig) -> None:
        data, runtime = config.data, config.runtime
        self.readers = [
            PairReader(
                source.pairs,
                seed=config.seed,
                window=data.shuffle_window,
                holdout=data.holdout,
                selection=source.selection,
                cache_folder=Path(runtime.cache_dir) if runtime.cache_dir else _default_cache(),
                cache_bytes=int(runtime.cache_gb * 1e9),
                allow_partial=data.allow_partial,
            )
            for source in data.sources
        ]
        self._weights = [source.weight for source in data.sources]
        self._mixture = Mixture(self._weights, config.seed, "pairs")
        self.target: Target = self.readers[0].target
        for reader in self.readers:
            if reader.target != self.target:
                raise UserError(
                    f"data.mix: {self.readers[0].root} has targets of the kind {self.target} and {reader.root} of the "
                    f"kind {reader.target}; mix datasets of one kind"
                )
            if config.loss.regression_weight and config.loss.regression_space == "latent" and self.target == "image":
                raise UserError(
                    f"loss.regression_space: latent compares x0, and {reader.root} stores images only; "
                    "set it to pixels, or use pairs with x0"
                )

    def read(self, positions: Sequence[int]) -> PairBatch:
        """The pairs at some positions, in the order given. Raises as :meth:`PairReader.read`."""
        places = self._mixture.by_source(positions)
        parts = [self.readers[source].read([at for _, at in entries]) for source, entries in places.items()]
        return _concatenate(parts, [place for entries in places.values() for place, _ in entries])

    def held_out(self) -> PairBatch | None:
        """The pairs of all datasets that are never trained on; None if there are none."""
        parts = [part for part in (reader.held_out() for reader in self.readers) if part.keys]
        return _concatenate(parts, range(sum(len(part.keys) for part in parts))) if parts else None

    def identities(self) -> tuple[DataIdentity, ...]:
        """The datasets by content."""
        return tuple(
            DataIdentity(
                fingerprint=reader.run.fingerprint,
                content_sha256=reader.content_sha256,
                selection_digest=reader.selection_digest,
                weight=weight,
            )
            for reader, weight in zip(self.readers, self._weights, strict=True)
        )

    def cursor(self, position: int) -> list[dict[str, Any]]:
        """Where each dataset stands at a position of the stream."""
        return [
            {
                "root": reader.root,
                "content_sha256": reader.content_sha256,
                "selection_digest": reader.selection_digest,
                "samples": reader.num_samples,
                "epoch": taken // reader.num_samples,
                "position_in_epoch": taken % reader.num_samples,
            }
            for reader, taken in zip(self.readers, self._mixture.before(position), strict=True)
        ]


def _concatenate(parts: Sequence[PairBatch], places: Sequence[int]) -> PairBatch:
    """One batch of several; ``places`` are those that the pairs, part after part, have in it."""
    if len(parts) == 1:
        return parts[0]
    order = sorted(range(len(places)), key=places.__getitem__)
    keys = [key for part in parts for key in part.keys]
    prompts = [prompt for part in parts for prompt in part.prompts]
    return PairBatch(
        keys=[keys[i] for i in order],
        noise=torch.cat([part.noise for part in parts])[order],
        target=torch.cat([part.target for part in parts])[order],
        prompts=[prompts[i] for i in order],
    )


def _default_cache() -> Path:
    return Path(tempfile.gettempdir()) / f"potstill-shards-{os.getuid()}"
