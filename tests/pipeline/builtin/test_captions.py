"""A caption says garment, colour and, every second time, ground; and the tokenizer reads all of it."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.builtin.captions import COLOURS, GARMENTS, GROUNDS, Look, caption, name, names
from pipeline.builtin.networks import TOKENS, tokenizer
from pipeline.builtin.randomness import generator

LOOKS = st.builds(
    Look,
    st.integers(0, len(GARMENTS) - 1),
    st.integers(0, len(COLOURS) - 1),
    st.integers(0, len(GROUNDS) - 1),
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_names_are_a_hundred_in_order_and_have_the_right_article():
    assert len(set(names())) == len(names()) == 100
    assert names()[37] == name(3, 7) == "a purple dress"
    assert name(9, 1) == "an orange ankle boot"
    assert name(1, 6) == "navy trousers"


@given(look=LOOKS, step=st.integers(0, 2**20))
def test_a_caption_is_of_its_look_and_of_no_other(tokens, look, step):
    text = caption(look, generator(0, "caption", step))
    words = text.split()
    assert [colour for colour in COLOURS if colour in words] == [list(COLOURS)[look.colour]]
    assert any(synonym in text for synonym in GARMENTS[look.garment])
    assert [ground for ground in GROUNDS if ground in words] in ([], [list(GROUNDS)[look.ground]])
    ids = tokens(text).input_ids
    assert len(ids) <= TOKENS
    assert tokens.decode(ids, skip_special_tokens=True).replace(" - ", "-") == text


def test_every_second_caption_leaves_the_ground_out_and_every_way_of_saying_it_occurs():
    look = Look(7, 3, 2)
    counts = Counter(caption(look, generator(0, "count", step)) for step in range(2000))
    assert sum(count for text, count in counts.items() if "beige" not in text) == pytest.approx(1000, abs=100)
    assert len(counts) == 2 * 4 * 2 * 2  # synonyms, openings, word orders, with ground or without


def test_words_are_single_tokens(tokens):
    for word in (*COLOURS, "sneaker", "trousers", "background", "pullover"):
        assert len(tokens(word).input_ids) == 3, word
    assert tokens("").input_ids == [tokens.bos_token_id, tokens.eos_token_id]
    assert tokens.pad_token_id == tokens.eos_token_id == max(tokens.get_vocab().values())
