"""Which captions are possible, and what is right about each: the table behind ``labels``.

    caption,garment,colour
    a red sneaker,sneaker,red

An image is right when, of all captions in the table, the one most like it is its prompt (see
:mod:`pipeline.scoring.zero_shot`).
"""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from pipeline.prompts import normalise

CAPTION = "caption"


@dataclass(frozen=True)
class Labels:
    """The table.

    Attributes:
        captions: C texts, each once.
        properties: name -> its value for each caption.
        digest: of all of it.
    """

    captions: list[str]
    properties: dict[str, list[str]]
    digest: str
    path: str

    @classmethod
    def read(cls, path: str) -> "Labels":
        """Read a .csv file. Raises UserError where it is none, or not as above."""
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"labels: {path} cannot be read ({error})") from None
        header, *rows = [row for row in csv.reader(text.splitlines()) if row] or [[]]
        if CAPTION not in header or not rows:
            raise UserError(f"labels: {path} needs a column {CAPTION} and a row for each caption")
        if short := [number for number, row in enumerate(rows, start=2) if len(row) != len(header)]:
            raise UserError(f"labels: {path}:{short[0]}: not {len(header)} fields as in the header")
        table = {name: [row[at] for row in rows] for at, name in enumerate(header)}
        captions = [normalise(caption) for caption in table.pop(CAPTION)]
        if len(set(captions)) < len(captions):
            raise UserError(f"labels: {path} names a caption twice; leave one out")
        return cls(captions, table, hashlib.sha256(text.encode()).hexdigest(), path)

    def truth(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Row of each prompt. Raises UserError for one that is no caption."""
        places = {caption: place for place, caption in enumerate(self.captions)}
        try:
            return np.array([places[prompt] for prompt in prompts], np.int64)
        except KeyError as error:
            raise UserError(
                f"labels: {self.path} has no caption {error.args[0]!r}, which is a prompt; add it, or leave labels out"
            ) from None
