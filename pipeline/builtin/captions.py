"""Text and colour of a garment: the words, and the captions made of them.

    caption = opening + colour + garment [+ ground],  such as "a photo of a teal ankle boot on a white background"

Every colour goes with every garment and every ground, so a caption has to be read whole.
"""

from dataclasses import dataclass

import torch

GARMENTS: tuple[tuple[str, ...], ...] = (
    ("t-shirt", "tee"),
    ("trousers", "pants"),
    ("pullover", "sweater"),
    ("dress", "gown"),
    ("coat", "overcoat"),
    ("sandal", "summer shoe"),
    ("shirt", "button-up shirt"),
    ("sneaker", "running shoe"),
    ("bag", "handbag"),
    ("ankle boot", "boot"),
)
"""The ten classes of Fashion-MNIST in its order; of several synonyms the first is the class's name here."""
PLURAL = frozenset({"trousers", "pants"})
"""Garments that take no article."""
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.15, 0.65, 0.20),
    "teal": (0.10, 0.75, 0.72),
    "blue": (0.15, 0.40, 1.00),
    "navy": (0.10, 0.12, 0.42),
    "purple": (0.58, 0.20, 0.80),
    "pink": (1.00, 0.50, 0.75),
    "brown": (0.50, 0.29, 0.12),
}
"""Red, green and blue in [0, 1]."""
GROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (1.00, 1.00, 1.00),
    "grey": (0.65, 0.65, 0.65),
    "beige": (0.93, 0.87, 0.76),
    "black": (0.04, 0.04, 0.04),
}
"""Plain grounds, likewise."""
OPENINGS = ("", "a photo of ", "a picture of ", "an image of ")


@dataclass(frozen=True)
class Look:
    """What is to be seen: indices into GARMENTS, COLOURS and GROUNDS."""

    garment: int
    colour: int
    ground: int


def name(garment: int, colour: int) -> str:
    """The plainest caption: ``a red sneaker``."""
    return _phrase(GARMENTS[garment][0], list(COLOURS)[colour])


def names() -> list[str]:
    """:func:`name` of every garment in every colour, garment by garment."""
    return [name(garment, colour) for garment in range(len(GARMENTS)) for colour in range(len(COLOURS))]


def caption(look: Look, generator: torch.Generator) -> str:
    """One of the many ways of saying it; every second caption leaves the ground out."""

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    synonyms = GARMENTS[look.garment]
    garment, colour = synonyms[draw(len(synonyms))], list(COLOURS)[look.colour]
    opening, inverted, grounded = OPENINGS[draw(len(OPENINGS))], draw(4) == 0, draw(2) == 0
    phrase = f"{_phrase(garment)} in {colour}" if inverted else _phrase(garment, colour)
    ground = f" on a {list(GROUNDS)[look.ground]} background" if grounded else ""
    return opening + phrase + ground


def vocabulary() -> list[str]:
    """Texts with every word that a caption can have: what the tokenizer is made from."""
    words = [*(synonym for synonyms in GARMENTS for synonym in synonyms), *COLOURS, *GROUNDS, *OPENINGS]
    return [*words, "a", "an", "in", "on", "background"]


def _phrase(garment: str, colour: str | None = None) -> str:
    words = garment if colour is None else f"{colour} {garment}"
    if garment in PLURAL:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
