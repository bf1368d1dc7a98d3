"""Prompt tables of a few texts: the sources they are made of, and what is in them."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prompts import PromptTable
from pipeline.shards.storage import Storage


def save(path: Path, texts: list[str | None]) -> str:
    """Write one text a row, in the format of the suffix; the column is called prompt."""
    if path.suffix == ".txt":
        path.write_bytes("".join(f"{text or ''}\n" for text in texts).encode())
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([["number", "prompt"], *([str(i), text or ""] for i, text in enumerate(texts))])
    elif path.suffix == ".jsonl":
        path.write_bytes("".join(json.dumps({"prompt": text, "n": 1}) + "\n" for text in texts).encode())
    else:
        pq.write_table(pa.table({"n": range(len(texts)), "prompt": pa.array(texts, pa.string())}), path)
    return str(path)


def rows_of(path: Path | str) -> list[tuple[str, str]]:
    table = pq.read_table(path)
    return list(zip(table["prompt_id"].to_pylist(), table["prompt"].to_pylist(), strict=True))


def open_table(path: Path | str) -> PromptTable:
    return PromptTable.open(*Storage.of_file(str(path)))
