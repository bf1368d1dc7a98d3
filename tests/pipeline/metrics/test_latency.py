import pytest
import torch

from configs.schema import DdimSampler, MixtureTeacherConfig
from pipeline import teachers
from pipeline.metrics import latency
from pipeline.metrics.latency import Spread, measure_latency

TEACHER = MixtureTeacherConfig(image_size=8)
SAMPLER = DdimSampler(steps=2)


def test_the_spread_is_the_quartiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(median=3.0, lower=2.0, upper=4.0)


def test_parts_add_up_and_warm_up_does_not_count(monkeypatch):
    # A clock that ticks: the text encoder takes 1 s, the sampler 10 s and the decoder 100 s, ten times that to warm up.
    teacher = teachers.load(TEACHER, torch.device("cpu"))
    now, calls = [0.0], []

    def slow(part, seconds):
        inner = getattr(teacher, part)

        def call(*args, **kwargs):
            calls.append((part, args, kwargs))
            first = sum(name == part for name, *_ in calls) <= (3 if part == "encode_prompts" else 2)
            now[0] += seconds * (10 if first else 1)
            return inner(*args, **kwargs)

        monkeypatch.setattr(teacher, part, call)

    for part, seconds in (("encode_prompts", 1.0), ("sample", 10.0), ("decode", 100.0)):
        slow(part, seconds)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    measured = measure_latency(
        teacher, SAMPLER, 3.0, evaluations_per_image=4, batch_size=5, negative_prompt="blue", warm_up=2, repetitions=4
    )
    assert measured.text_encoder == Spread(1, 1, 1)
    assert measured.network == Spread(10, 10, 10)
    assert measured.decoder == Spread(100, 100, 100)
    assert measured.total == Spread(111, 111, 111)
    assert measured.images_per_s == pytest.approx(5 / 111)
    assert [len(args[0]) for part, args, _ in calls if part == "encode_prompts"] == [1] + [5] * 6
    sampled = [(args[0].shape, args[3:], kwargs) for part, args, kwargs in calls if part == "sample"]
    assert sampled == [((5, 3, 8, 8), (SAMPLER, 3.0), {"seed": 0, "sample_ids": range(5)})] * 6


def test_it_says_what_was_measured():
    teacher = teachers.load(TEACHER, torch.device("cpu"))
    evaluations = teachers.sampler_evaluations(TEACHER, SAMPLER, 3.0)
    measured = measure_latency(
        teacher, SAMPLER, 3.0, evaluations_per_image=evaluations, batch_size=2, warm_up=0, repetitions=2
    )
    assert measured.evaluations_per_image == 4  # two steps, two branches
    assert measured.device.startswith("cpu, ")
    assert (measured.dtype, measured.batch_size, measured.repetitions) == ("float32", 2, 2)
    assert 0 < measured.total.lower <= measured.total.median <= measured.total.upper
