"""Whatever is written into a cell is read out of that cell, word by word."""

import re

from hypothesis import given
from hypothesis import strategies as st

from pipeline.markdown_table import markdown_row


def cells(line):
    """A row as GitHub's Markdown reads it: a bar ends a cell unless a backslash is before it."""
    assert len(re.split(r"[\r\n]", line)) == 1
    before, *found, behind = re.split(r"(?<!\\)\|", line)
    assert (before, behind) == ("", "")
    return [cell.replace("\\|", "|").split() for cell in found]


@given(st.lists(st.text("ab|\\` ") | st.text(), min_size=1))
def test_a_row_has_the_cells_that_were_written(texts):
    assert cells(markdown_row(texts)) == [text.split() for text in texts]


def test_a_text_of_several_lines_stays_in_one():
    assert markdown_row(["a", "two\r\nlines\nand | a bar"]) == "| a | two lines and \\| a bar |"
