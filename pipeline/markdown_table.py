"""Rows of Markdown tables of whatever text: what a user named stays in its cell.

A bar ends a cell, and a line break ends the table, as GitHub's Markdown has it; a bar behind a backslash is a bar.
"""

from collections.abc import Iterable


def markdown_cell(text: str) -> str:
    """A text as it may stand in a cell, on one line."""
    return " ".join(text.splitlines()).replace("|", "\\|")


def markdown_row(texts: Iterable[str]) -> str:
    """A line of a table, a cell for each text."""
    return f"| {' | '.join(map(markdown_cell, texts))} |"
