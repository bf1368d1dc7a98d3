import numpy as np
import pytest

from pipeline.teachers.pictures import COLOURS, GROUND, SHAPES, captions, draw_all


def test_captions_are_in_the_order_of_the_pictures() -> None:
    names = captions()
    assert names[:2] == ["a red circle", "a red square"]
    assert len(set(names)) == len(names) == len(draw_all(8)) == len(COLOURS) * len(SHAPES)
    by_caption = {name.split(" ", 1)[1]: picture for name, picture in zip(names, draw_all(32), strict=True)}
    for colour, levels in COLOURS.items():
        assert tuple(by_caption[f"{colour} square"][:, 16, 16]) == levels
        assert tuple(by_caption[f"{colour} ring"][:, 16, 16]) == GROUND


@pytest.mark.parametrize("size", [8, 9, 32])
def test_shapes_have_their_area(size: int) -> None:
    """The share of a pixel's colour that is not ground is its coverage; summed up it is the area."""
    exact = {  # in units of the square of side 2
        "circle": np.pi * 0.7**2 / 4,
        "square": 0.62**2,
        "triangle": 0.65 * 1.3 / 4,
        "diamond": 0.85**2 / 2,
        "cross": (2 * 0.5 * 1.5 - 0.5**2) / 4,
        "ring": np.pi * (0.78**2 - 0.45**2) / 4,
    }
    black, ground = COLOURS["black"][0], GROUND[0]
    by_caption = dict(zip(captions(), draw_all(size), strict=True))
    for shape, area in exact.items():
        coverage = (ground - by_caption[f"a black {shape}"][0].astype(float)) / (ground - black)
        assert coverage.mean() == pytest.approx(area, abs=0.02)


def test_shapes_are_centred_left_to_right() -> None:
    pictures = draw_all(32).astype(int)
    assert abs(pictures - pictures[..., ::-1]).max() <= 35  # a column of sub-pixels at most


def test_pictures_are_distinct_at_the_smallest_size() -> None:
    pictures = draw_all(8).reshape(-1, 3 * 64).astype(float) / 127.5 - 1
    distances = np.linalg.norm(pictures[:, None] - pictures[None], axis=-1) + 9 * np.eye(len(pictures))
    assert distances.min() > 10 * 0.05  # ten default std apart
