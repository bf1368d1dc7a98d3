"""The page: whole, self-contained, and what it says is what was found."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import evaluation

from pipeline.evaluation import tables
from pipeline.evaluation.grid import draw_grid, shown_ids
from pipeline.evaluation.plots import draw_quality
from pipeline.evaluation.report_markdown import render_markdown
from pipeline.evaluation.report_page import render_page
from pipeline.evaluation.results import Report, SystemResult, Timing, read_report
from pipeline.shard_maker import preview_ids
from pipeline.shards.storage import Storage

EMPTY = {"meta", "link", "img"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.texts, self.tables = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        self.open += [] if tag in EMPTY else [tag]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture
def report(finished):
    return read_report(Storage.open(str(finished)))


@pytest.fixture
def page(finished):
    return Page((finished / "report.html").read_text())


def test_the_page_asks_no_server_for_anything(finished, page):
    assert page.links
    assert all(link.startswith("data:") for link in page.links)
    text = (finished / "report.html").read_text()
    assert not re.search(r"url\(|@import|<script|<iframe|https?://", text)


def test_page_and_markdown_say_the_same(finished, page, report):
    expected = [tables.header(report), *tables.rows(report)]
    assert page.tables[0] == expected
    markdown = (finished / "report.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[0] == expected[0]
    assert cells[4][:3] == expected[3][:3]  # the student, below the line of dashes
    for picture in re.findall(r"\]\((\S+)\)", markdown):
        assert (finished / picture).is_file()


def test_the_grid_shows_the_images_of_each_system(finished, page, report):
    pictures = [base64.b64decode(link.partition(",")[2]) for link in page.links if link.startswith("data:image")]
    shown = [picture for picture in pictures if Image.open(io.BytesIO(picture)).size == (16, 16)]
    expected = [
        (finished / "images" / system / "previews" / f"{key}.png").read_bytes()
        for key in report.grid
        for system in ("teacher-3", "teacher-1", "student")
    ]
    assert shown == expected
    assert len(set(expected)) == len(expected)
    assert set(report.grid.values()) <= set(evaluation.PROMPTS)


def system(name, evaluations, fid=1.0, seconds=1.0, device="cpu", **changes):
    timing = Timing(
        batch_size=4, device=device, total=(seconds, seconds, seconds), text_encoder=0.0, network=seconds, decoder=0.0
    )
    return SystemResult(
        **{
            "name": name,
            "title": name,
            "family": "teacher",
            "is_student": False,
            "steps": 1,
            "evaluations": evaluations,
            "sampling": "",
            "num_images": 8,
            "num_rejected": 0,
            "numbers": {"frechet_distance": fid},
            "timings": (timing,),
            "fingerprint": name,
            "content_sha256": name,
            "weights_digest": "",
            **changes,
        }
    )


def small_report(*systems, **changes):
    return Report(
        **{"title": "t", "protocol": {}, "systems": systems, "grid": {}, "run": {}, "provenance": {}, **changes}
    )


def test_what_a_student_saves():
    student = system("student", 1, 2.0, 0.5, is_student=True)
    report = small_report(system("a", 8, 3.0, 4.0), system("b", 100, 1.5, 25.0), student)
    assert [row[3] for row in tables.rows(report)] == ["6.25 x", "1.00 x", "50.0 x"]
    assert tables.summary(report) == [
        "student: FID 2.000 in 1 evaluation an image; b: 1.500 in 100 evaluations. "
        "That is 1/100 of the evaluations and 50.0 times as many images a second."
    ]


def test_times_of_two_devices_are_not_divided():
    student = system("student", 1, 2.0, 0.01, device="H100, float32", is_student=True)
    few, teacher = system("a", 8, seconds=5.0), system("b", 100, seconds=10.0, device="cpu, 2 threads, float32")
    report = small_report(few, teacher, student)
    assert [row[2:4] for row in tables.rows(report)] == [["0.800", ""], ["0.400", "1.00 x"], ["400", ""]]
    (sentence,) = tables.summary(report)
    assert sentence.endswith("That is 1/100 of the evaluations.")


def test_a_sentence_has_no_exponent_either():
    student = system("student", 1, is_student=True)
    (sentence,) = tables.summary(small_report(system("a", 2000, seconds=1500.0), student))
    assert sentence.endswith("That is 1/2,000 of the evaluations and 1,500 times as many images a second.")


def test_text_is_not_taken_for_markup():
    nasty = '<script>alert("1")</script> | & "x"'
    report = small_report(system("a", 1, title=nasty), title=nasty, grid={"000000000": nasty})
    page = Page(render_page(report, tiles={"a": [None]}, quality=None, curves={}))
    assert page.texts.count(nasty) >= 3
    assert "<script>" not in render_page(report, tiles={"a": [None]}, quality=None, curves={})
    assert "\\| & " in render_markdown(report, has_quality=False, curves=[])


@given(st.floats(1e-7, 1e9), st.integers(1, 6))
def test_numbers_keep_their_digits_and_never_an_exponent(value, digits):
    text = tables.number(value, digits)
    assert re.fullmatch(r"[\d,]+(\.\d+)?", text)
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.5 * 10 ** (1 - digits) + 1e-12)


@given(st.integers(1, 3000), st.integers(1, 30), st.integers(1, 24))
def test_shown_images_have_previews_and_a_prompt_each(num_images, per_prompt, count):
    ids = shown_ids(num_images, per_prompt, count)
    prompts = [i // per_prompt for i in ids]
    assert set(ids) <= set(preview_ids(num_images))
    assert sorted(set(prompts)) == prompts
    assert len(ids) == min(count, len({i // per_prompt for i in preview_ids(num_images)}))


def test_a_picture_is_in_its_column_and_row():
    def tile(level):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    grid = draw_grid(["p", "q"], {"a": [tile(10), tile(20)], "b": [tile(30), None]})
    pixels = np.asarray(Image.open(io.BytesIO(grid)))
    places = [(row, column) for row in range(2) for column in range(2)]
    found = [int(pixels[24 + row * 136 + 64, 170 + column * 136 + 64, 0]) for row, column in places]
    assert found == [10, 30, 20, 255]


def test_nothing_to_plot_is_no_plot():
    assert draw_quality([system("a", 1, numbers={"diversity": 1.0})]) is None


def test_report_json_reads_back(finished, report):
    assert json.loads(report.to_json()) == json.loads((finished / "report.json").read_bytes())
