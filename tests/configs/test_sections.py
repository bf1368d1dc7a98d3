"""Layers merge key by key, except where a tag changes."""

from typing import Literal

import hypothesis.strategies as st
from hypothesis import given, settings
from pydantic import Field

from configs.schema import GeneratePairsConfig, Model, SamplerConfig
from configs.sections import merge

TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=10)
LAYERS = st.dictionaries(st.sampled_from("abc"), TREES)


def leaves(tree: dict, prefix: tuple = ()) -> dict:
    """{path: value} of everything that is not a mapping."""
    found: dict = {}
    for key, value in tree.items():
        found |= leaves(value, (*prefix, key)) if isinstance(value, dict) else {(*prefix, key): value}
    return found


@settings(max_examples=50)
@given(base=LAYERS, top=LAYERS)
def test_the_upper_layer_wins(base, top):
    merged = leaves(merge(None, base, top))
    assert leaves(top).items() <= merged.items() <= leaves(base).items() | leaves(top).items()


@settings(max_examples=50)
@given(base=LAYERS)
def test_the_lower_layer_fills_in(base):
    assert leaves(merge(None, {"section": base}, {"section": {"other": 1}})) == {
        **leaves({"section": base}),
        ("section", "other"): 1,
    }


@settings(max_examples=50)
@given(a=LAYERS, b=LAYERS, c=LAYERS)
def test_layers_apply_one_after_the_other(a, b, c):
    assert merge(None, a, b, c) == merge(None, merge(None, a, b), c)


@settings(max_examples=50)
@given(base=LAYERS)
def test_an_empty_layer_changes_nothing(base):
    assert merge(None, base, {}) == base == merge(None, {}, base)


def test_another_variant_replaces_the_section():
    base = {"teacher": {"kind": "mixture", "std": 0.1}, "spec": {"sampler": {"name": "ddim", "rho": 3.0}, "seed": 1}}
    top = {"teacher": {"kind": "stable_diffusion"}, "spec": {"sampler": {"name": "edm_heun"}}}
    assert merge(GeneratePairsConfig, base, top) == {
        "teacher": {"kind": "stable_diffusion"},
        "spec": {"sampler": {"name": "edm_heun"}, "seed": 1},
    }


def test_the_same_variant_or_none_merges():
    base = {"spec": {"sampler": {"name": "ddim", "rho": 3.0}}}
    for sampler in ({"name": "ddim", "steps": 5}, {"steps": 5}):
        merged = merge(GeneratePairsConfig, base, {"spec": {"sampler": sampler}})
        assert merged == {"spec": {"sampler": {"name": "ddim", "rho": 3.0, "steps": 5}}}
    assert merge(GeneratePairsConfig, {"teacher": {"std": 0.1}}, {"teacher": {"kind": "mixture"}}) == {
        "teacher": {"std": 0.1, "kind": "mixture"}
    }


def test_a_free_form_mapping_merges_whatever_its_keys():
    base = {"spec": {"sampler": {"name": "diffusers", "options": {"name": "x", "a": 1}}}}
    top = {"spec": {"sampler": {"options": {"name": "y"}}}}
    merged = merge(GeneratePairsConfig, base, top)
    assert merged["spec"]["sampler"]["options"] == {"name": "y", "a": 1}


def test_a_tag_that_only_the_lower_layer_gives_still_says_what_lies_inside():
    class Plain(Model):
        kind: Literal["plain"] = "plain"

    class Sampled(Model):
        kind: Literal["sampled"] = "sampled"
        sampler: SamplerConfig

    class Config(Model):
        teacher: Plain | Sampled = Field(discriminator="kind")

    base = {"teacher": {"kind": "sampled", "sampler": {"name": "ddim", "steps": 3}}}
    top = {"teacher": {"sampler": {"name": "edm_heun"}}}
    assert merge(Config, base, top) == {"teacher": {"kind": "sampled", "sampler": {"name": "edm_heun"}}}
