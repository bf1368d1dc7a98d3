"""From an expression over index and scores to a selection, in one pass over the shards.

    stored samples -> each part of the expression in turn -> one of a prompt -> at most so many -> keys

A sample that goes is counted for the first reason there is. Index and scores are read shard by shard, and only where
the expression names one of their columns. Memory: some shards' tables, the commit records, and 8 bytes for each sample
that the expression leaves. One of a prompt takes a row group of the prompt table, too, and a few times 8 bytes for each
of its rows that has a sample left.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from configs.errors import UserError
from configs.score_schema import SelectPairsConfig
from pipeline.prompts import PromptTable
from pipeline.scoring.score_table import read_record, read_scores, score_names
from pipeline.selecting.filter_expression import Condition, parse_conditions
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import PROMPTS
from pipeline.shards.manifest import read_commits, read_indices
from pipeline.shards.order import permutation
from pipeline.shards.records import Commit
from pipeline.shards.selection import read_selection, write_selection
from pipeline.shards.split import stored_ids
from pipeline.shards.storage import Storage
from pipeline.shards.writer import INDEX_SCHEMA

_ID = "sample_id"
_OF_REJECTED = ("status", "reason")
_ROWS = 1 << 18
"""Samples that are looked at together."""


def select_pairs(config: SelectPairsConfig) -> None:
    """Write the selection, and print how many remain and why the others went. What ``stages/select_pairs.py`` does.

    Raises:
        UserError: the expression cannot work, scores are missing, nothing remains, or the output holds another
            selection.
        DamagedShard: an index or a table of scores is not what was written.
    """
    if not config.output.endswith(".parquet"):
        raise UserError(f"{config.output}: a selection is a .parquet file; name the output so")
    dataset = Dataset.open(Storage.open(config.root))
    commits = read_commits(dataset)
    records = {name: read_record(dataset, name) for name in score_names(dataset)} if config.where else {}
    columns = {field.name: field.type for field in INDEX_SCHEMA if field.name not in _OF_REJECTED}
    columns |= {f"{name}.{field.name}": field.type for name, of in records.items() for field in list(of.schema)[1:]}
    conditions = parse_conditions(config.where, columns)

    reasons = {"shards not made yet": dataset.run.num_shards - len(commits)}
    num_stored = sum(commit.num_samples for commit in commits)
    ids = _filtered(dataset, commits, conditions, reasons)
    if config.dedupe_prompts:
        num_left = len(ids)
        ids = _one_of_a_prompt(dataset, ids)
        reasons["prompt has one already"] = num_left - len(ids)
    if config.limit is not None and len(ids) > config.limit:
        reasons["over the limit"] = len(ids) - config.limit
        if config.sample_seed is not None:
            ids = ids[np.sort(permutation(len(ids), f"select/{config.sample_seed}")[: config.limit])]
        ids = ids[: config.limit]

    width = max(len(reason) for reason in [*reasons, "pairs stored"])
    print(f"{'pairs stored':<{width}} {num_stored:>13,}")
    for reason, count in reasons.items():
        if count or reason.startswith("not "):
            print(f"{reason:<{width}} {count:>13,}")
    print(f"{'remain':<{width}} {len(ids):>13,}")
    if not len(ids):
        raise UserError(f"where: no pair of {config.root} is left; ask for less")
    used = sorted({name.partition(".")[0] for condition in conditions for name in condition.columns} & records.keys())
    scores = ", ".join(f"{name} {records[name].digest[:12]}" for name in used)
    print(_write(config, dataset, ids, scores))


def _filtered(
    dataset: Dataset, commits: Sequence[Commit], conditions: Sequence[Condition], reasons: dict[str, int]
) -> NDArray[np.int64]:
    """Ids, increasing, of the stored samples that meet all conditions; counts in ``reasons`` why others do not."""
    names = sorted({name for condition in conditions for name in condition.columns})
    failed = dict.fromkeys((f"not {condition.text}" for condition in conditions), 0)
    parts = [np.zeros(0, np.int64)]
    for table in _grouped(_tables(dataset, commits, names)):
        for condition in conditions:
            kept = table.filter(condition.expression)
            failed[f"not {condition.text}"] += len(table) - len(kept)
            table = kept
        parts.append(table[_ID].to_numpy())
    reasons |= failed
    return np.sort(np.concatenate(parts))


def _one_of_a_prompt(dataset: Dataset, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of ids, which increase, the first of each prompt.

    Raises:
        UserError: the prompt table is not there, or not the one that the samples refer to.
    """
    table, spec = PromptTable.open(dataset.storage, PROMPTS), dataset.run.pairs
    if table.digest != spec.prompts_digest:
        raise UserError(
            f"{dataset.storage.uri}/{PROMPTS}: not the prompt table of this dataset; "
            f"put back the one with the digest {spec.prompts_digest[:16]}"
        )
    ids = ids[np.diff(ids // spec.pairs_per_prompt, prepend=-1) != 0]  # of each row of the table the first
    # A table may repeat a prompt: one of classes does, and one with keep_duplicates.
    _, first = np.unique(table.ids(ids // spec.pairs_per_prompt), return_index=True)
    return ids[np.sort(first)]


def _tables(dataset: Dataset, commits: Sequence[Commit], names: Sequence[str]) -> Iterator[pa.Table]:
    """Of every shard its stored samples: their ids, and the columns of these full names."""
    in_index = [name for name in names if "." not in name]
    by_score: dict[str, list[str]] = {}
    for name in names:
        if "." in name:
            score, _, column = name.partition(".")
            by_score.setdefault(score, []).append(column)
    indices = read_indices(dataset, commits) if in_index else (None for _ in commits)
    scores = {score: read_scores(dataset, score, columns) for score, columns in by_score.items()}
    for commit, index, *tables in zip(commits, indices, *scores.values(), strict=True):
        arrays: dict[str, pa.Array | pa.ChunkedArray] = {_ID: pa.array(stored_ids(dataset.run, commit))}
        if index is not None:
            stored = index.filter(pc.field("status") == "ok")
            arrays |= {name: stored[name] for name in in_index}
        for score, table in zip(scores, tables, strict=True):
            arrays |= {f"{score}.{column}": table[column] for column in by_score[score]}
        yield pa.table(arrays)


def _grouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Some tables at a time in one: a filter costs the same for a thousand rows and for a hundred thousand."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= _ROWS:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _write(config: SelectPairsConfig, dataset: Dataset, ids: NDArray[np.int64], scores: str) -> str:
    """Write the selection unless it is there; returns what to say.

    Raises:
        UserError: the output is something else.
    """
    fingerprint = dataset.run.fingerprint
    storage, name = Storage.of_file(config.output)
    if storage.exists(name):
        if not np.array_equal(read_selection(config.output, fingerprint).sample_ids, ids):
            raise UserError(f"{config.output}: holds another selection; remove it or name another output")
        return f"{config.output} is there already with the same pairs: nothing to do"
    asked = config.model_dump(include={"where", "dedupe_prompts", "limit", "sample_seed"}, exclude_defaults=True)
    query = "; ".join(
        [*(f"{name} {value}" for name, value in asked.items()), *([f"scores {scores}"] if scores else [])]
    )
    info = write_selection(config.output, ids, fingerprint=fingerprint, query=query or "all")
    return f"{config.output} written, digest {info.digest[:16]}; name it as data.selection of a training"
