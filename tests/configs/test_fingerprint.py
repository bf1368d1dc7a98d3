"""A fingerprint is pinned, covers every field, and depends on nothing else."""

import json
import math
from typing import Any, Literal, get_args, get_origin

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from configs import schema
from configs.fingerprint import ABSENT, canonical_json, differences, fingerprint
from configs.schema import Model, PairsSpec

TOY = PairsSpec(
    sampler=schema.EdmHeunSampler(steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0),
    guidance_scale=1.0,
    negative_prompt="",
    seed=0,
    pairs_per_prompt=32,
    num_samples=1536,
    fields=schema.FieldsConfig(noise=True, x0="pixels", x0_dtype="float16", image="png", prompt=True),
    teacher=schema.TeacherIdentity(
        kind="mixture",
        weights_digest="0" * 64,
        dtype="float32",
        parametrization="x0",
        schedule="edm",
        latent_scale=None,
        sample_shape=(3, 32, 32),
        image_shape=(3, 32, 32),
    ),
    prompts_digest="1" * 64,
    noise_recipe="philox-np-v1",
    format_version=1,
)
STABLE_DIFFUSION = PairsSpec(
    sampler=schema.DiffusersSampler(scheduler="PNDMScheduler", steps=50, options={"timestep_spacing": "trailing"}),
    guidance_scale=7.5,
    negative_prompt="blurry, café",
    seed=2**63 - 1,
    pairs_per_prompt=1,
    num_samples=500_000,
    fields=schema.FieldsConfig(noise=False, x0="latent", x0_dtype="float16", image="none", prompt=True),
    teacher=schema.TeacherIdentity(
        kind="stable_diffusion",
        weights_digest="2" * 64,
        dtype="float16",
        parametrization="eps",
        schedule="vp:scaled_linear:0.00085:0.012:1000",
        latent_scale=0.18215,
        sample_shape=(4, 64, 64),
        image_shape=(3, 512, 512),
    ),
    prompts_digest="3" * 64,
    noise_recipe="philox-np-v1",
    format_version=1,
)
DDIM = TOY.model_copy(update={"sampler": schema.DdimSampler(steps=50, sigma_min=0.002, sigma_max=80.0, rho=7.0)})

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OPTIONS = st.dictionaries(st.text(), JSON, max_size=4)


# A dataset on disk is found by its fingerprint. To change one of these values is to orphan every dataset ever made:
# nothing may be resumed, verified or trained on any more. If that is meant, raise FORMAT_VERSION and say so.
@pytest.mark.parametrize(
    ("spec", "pinned"),
    [
        (TOY, "e6391ccbe9551e2061d6eb5bc09d2ee0b0641e373b3eb14bb4b1e728271d0604"),
        (STABLE_DIFFUSION, "450ee3e9fa3ab49347cfde037ec4836defb101dbfd8786dc1c0bb934b19e8156"),
        (DDIM, "2cb838785a16e5d12bc8eaac09fcc4a5d9810881d32ab726ec5b444e73ca9820"),
    ],
)
def test_golden_fingerprints(spec, pinned):
    assert fingerprint(spec) == pinned


def test_canonical_json_is_sorted_compact_ascii():
    class Inner(Model):
        b: float = 1e-05
        a: tuple[int, ...] = (1, 2)

    class Outer(Model):
        z: Inner = Inner()
        y: str = "é"
        x: None = None

    assert canonical_json(Outer()) == r'{"x":null,"y":"\u00e9","z":{"a":[1,2],"b":1e-05}}'


def test_two_types_with_equal_fields_differ():
    class One(Model):
        steps: int = 1

    class Two(Model):
        steps: int = 1

    assert canonical_json(One()) == canonical_json(Two())
    assert fingerprint(One()) != fingerprint(Two())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint(TOY.model_copy(update={"guidance_scale": value}))


def leaves(model: Model, prefix: str = ""):
    """(dotted key, copy with only that field changed, to another value of its type) of every leaf."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, Model):
            for key, changed in leaves(value, f"{prefix}{name}."):
                yield key, model.model_copy(update={name: changed})
        else:
            for other in others(field.annotation, value):
                yield prefix + name, model.model_copy(update={name: other})


def others(kind: Any, value: object):
    """Values of a type that are not ``value``, among them the closest ones."""
    if get_origin(kind) is Literal:
        yield from set(get_args(kind)) - {value}
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif isinstance(value, float):
        yield math.nextafter(value, math.inf)
    elif isinstance(value, str):
        yield value + " "
    elif isinstance(value, tuple):
        yield (*value[:-1], value[-1] + 1)
    elif isinstance(value, dict):
        yield {**value, "": None}
    else:
        assert value is None
        yield 1.0


@pytest.mark.parametrize("spec", [TOY, STABLE_DIFFUSION, DDIM], ids=["toy", "stable_diffusion", "ddim"])
def test_every_single_change_of_a_field_changes_the_fingerprint(spec):
    changed = list(leaves(spec))
    assert len({fingerprint(spec), *(fingerprint(other) for _, other in changed)}) == 1 + len(changed)
    assert {key for key, _ in changed} == flat_keys(spec) - {"sampler.name"}  # which has one value in each sampler


def flat_keys(model: Model, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, value in model:
        keys |= flat_keys(value, f"{prefix}{name}.") if isinstance(value, Model) else {prefix + name}
    return keys


def test_how_and_where_it_is_computed_is_out_of_reach_of_a_spec():
    def reachable(kind: Any) -> set[type]:
        if isinstance(kind, type) and issubclass(kind, Model):
            return {kind}.union(*(reachable(field.annotation) for field in kind.model_fields.values()))
        return set().union(*map(reachable, get_args(kind)))

    samplers = {schema.EdmHeunSampler, schema.DdimSampler, schema.DiffusersSampler}
    assert reachable(PairsSpec) == {PairsSpec, schema.TeacherIdentity, schema.FieldsConfig, *samplers}


@settings(max_examples=50)
@given(order=st.randoms(use_true_random=False), options=OPTIONS)
def test_the_order_of_keys_is_irrelevant(order, options):
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        items = [(key, shuffled(inner)) for key, inner in value.items()]
        order.shuffle(items)
        return dict(items)

    sampler = schema.DiffusersSampler(options=options)
    spec = STABLE_DIFFUSION.model_copy(update={"sampler": sampler})
    assert fingerprint(PairsSpec.model_validate(shuffled(spec.model_dump()))) == fingerprint(spec)


@settings(max_examples=50)
@given(
    guidance_scale=st.floats(min_value=0, allow_infinity=False),
    seed=st.integers(0, 2**63 - 1),
    text=st.text(),
    options=OPTIONS,
)
def test_the_fingerprint_survives_the_way_through_json(guidance_scale, seed, text, options):
    spec = STABLE_DIFFUSION.model_copy(
        update={
            "guidance_scale": guidance_scale,
            "seed": seed,
            "negative_prompt": text,
            "sampler": schema.DiffusersSampler(options=options),
        }
    )
    again = PairsSpec.model_validate_json(canonical_json(spec))
    assert again == spec
    assert fingerprint(again) == fingerprint(spec)


def test_differences_name_the_keys_and_both_values():
    other = json.loads(canonical_json(TOY.model_copy(update={"seed": 7, "sampler": schema.DdimSampler(steps=20)})))
    del other["prompts_digest"]
    assert differences(TOY.model_dump(), other) == [
        ("sampler.name", "edm_heun", "ddim"),
        ("sampler.steps", 18, 20),
        ("sampler.s_churn", 0.0, ABSENT),
        ("sampler.s_min", 0.0, ABSENT),
        ("sampler.s_max", None, ABSENT),
        ("sampler.s_noise", 1.0, ABSENT),
        ("seed", 0, 7),
        ("prompts_digest", "1" * 64, ABSENT),
    ]


def test_a_spec_does_not_differ_from_itself_read_back():
    assert differences(TOY.model_dump(), json.loads(canonical_json(TOY))) == []


@settings(max_examples=50)
@given(a=OPTIONS, b=OPTIONS)
def test_there_are_differences_exactly_when_the_canonical_json_differs(a, b):
    one, two = schema.DiffusersSampler(options=a), schema.DiffusersSampler(options=b)
    assert bool(differences(one.model_dump(), two.model_dump())) == (canonical_json(one) != canonical_json(two))
