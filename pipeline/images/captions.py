"""Prompts of named images, from a table beside them: columns file_name and another one."""

from configs.encode_schema import NamedFilesSource
from configs.errors import UserError
from pipeline.prompt_sources import read_prompts
from pipeline.prompts import normalise

NAME_COLUMN = "file_name"


def read_captions(config: NamedFilesSource, names: list[str]) -> dict[str, str]:
    """Name -> prompt, normalised as prompt tables are.

    Args:
        config: where the table is.
        names: of the images.

    Raises:
        UserError: the table cannot be read, or does not name every image exactly once.
    """
    path = config.captions
    assert path is not None
    if path.lower().endswith(".txt"):
        raise UserError(f"source.captions: {path} has no column {NAME_COLUMN}; give a .csv, .jsonl or .parquet")
    given: dict[str, str] = {}
    columns = (read_prompts(path, column) for column in (NAME_COLUMN, config.caption_column))
    for name, text in zip(*columns, strict=True):
        if name in given:
            raise UserError(f"source.captions: {path} names {name} twice; leave one out")
        given[name or ""] = normalise(text or "")
    missing = [name for name in names if name not in given]
    if missing:
        raise UserError(f"source.captions: {path} names {missing[0]} and {len(missing) - 1} other images not; add them")
    return given
