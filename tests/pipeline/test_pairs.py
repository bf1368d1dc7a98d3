"""A toy dataset, made in this process: what is in it, and that nothing but the spec decides it."""

import io
import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.toy import PROMPTS, files, samples, shard_bytes, toy_config

from configs.errors import RunStopped, UserError
from configs.schema import VerifyShardsConfig
from pipeline import teachers
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import verify_shards
from pipeline.noise import noise, noise_digest
from pipeline.sampling import TeacherBatch, rejection_reasons
from pipeline.shard_maker import preview_ids
from pipeline.shards.dataset import Dataset
from pipeline.shards.members import decode_array, decode_image
from pipeline.shards.storage import Storage
from pipeline.teachers.mixture import MixtureTeacher


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    config = toy_config(folder / "root", folder)
    generate_pairs(config)
    return config, folder / "root"


def test_every_sample_is_there_once_with_its_noise_and_its_prompt(dataset):
    _, root = dataset
    found = samples(root)
    assert list(found) == [f"{i:09d}" for i in range(40)]
    for i, (members, row) in enumerate(found.values()):
        expected = noise(7, i, (3, 8, 8))
        np.testing.assert_array_equal(decode_array(members["noise.npy"]), expected)
        assert row["noise_digest"] == noise_digest(expected)
        assert members["txt"].decode() == row["prompt"] == PROMPTS[i // 8]
        assert json.loads(members["json"])["key"] == row["key"]


def test_the_sampler_starts_from_the_stored_noise(dataset):
    config, root = dataset
    teacher = teachers.load(config.teacher, torch.device("cpu"))
    members, row = samples(root)["000000011"]
    start = torch.from_numpy(decode_array(members["noise.npy"])).float()[None]
    condition = teacher.encode_prompts([row["prompt"]])
    x0 = teacher.sample(
        start, condition, teacher.encode_prompts([""]), config.spec.sampler, 1.0, seed=7, sample_ids=[11]
    )
    np.testing.assert_allclose(decode_array(members["x0.npy"]), x0[0].numpy(), atol=1e-3)  # float16 storage


def test_the_image_is_the_rounded_x0(dataset):
    _, root = dataset
    for members, _ in samples(root).values():
        x0 = decode_array(members["x0.npy"]).astype(np.float32)
        levels = np.clip((x0 + 1) * 127.5, 0, 255).transpose(1, 2, 0)
        assert np.abs(decode_image(members["png"]) - levels).max() <= 0.5 + 0.15  # half a level, and x0's rounding


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_the_batch_size_changes_rounding_only(dataset, tmp_path, batch_size):
    _, root = dataset
    config = toy_config(tmp_path / "root", tmp_path, runtime={"batch_size": batch_size})
    generate_pairs(config)
    ours, theirs = samples(tmp_path / "root"), samples(root)
    assert ours.keys() == theirs.keys()
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        for same in ("json", "noise.npy", "txt"):
            assert one[0][same] == other[0][same]
        np.testing.assert_allclose(decode_array(one[0]["x0.npy"]), decode_array(other[0]["x0.npy"]), atol=2e-3)


def test_the_same_spec_gives_the_same_bytes_elsewhere(dataset, tmp_path):
    config, root = dataset
    generate_pairs(config.model_copy(update={"output": str(tmp_path / "root")}))
    assert shard_bytes(tmp_path / "root") == shard_bytes(root)


def test_the_shard_size_moves_samples_and_changes_none(dataset, tmp_path):
    _, root = dataset
    config = toy_config(tmp_path / "root", tmp_path, layout={"samples_per_shard": 12})
    generate_pairs(config)
    assert len(shard_bytes(tmp_path / "root")) == 4
    ours = {key: members | {"json": b""} for key, (members, _) in samples(tmp_path / "root").items()}
    theirs = {key: members | {"json": b""} for key, (members, _) in samples(root).items()}
    assert ours == theirs


def test_run_again_there_is_nothing_to_do(dataset, capsys):
    config, root = dataset
    before = files(root)
    generate_pairs(config)
    assert "nothing to do" in capsys.readouterr().out
    assert files(root) == before


def test_only_what_is_missing_is_made(dataset, tmp_path, monkeypatch):
    config, root = dataset
    config = config.model_copy(update={"output": str(tmp_path / "root")})
    generate_pairs(config)
    for path in ("SEALED.json", "commits/000003.json"):
        (tmp_path / "root" / path).unlink()
    commits = files(tmp_path / "root" / "commits")
    sampled = []
    original = MixtureTeacher.sample
    monkeypatch.setattr(
        MixtureTeacher, "sample", lambda *args, **kw: sampled.extend(kw["sample_ids"]) or original(*args, **kw)
    )
    generate_pairs(config)
    assert sorted(sampled) == list(range(24, 32))
    assert shard_bytes(tmp_path / "root") == shard_bytes(root)
    assert commits.items() <= files(tmp_path / "root" / "commits").items()


def test_fields_are_stored_by_choice(tmp_path):
    fields = {"noise": False, "x0": "pixels", "x0_dtype": "float32", "image": "webp", "prompt": False}
    config = toy_config(tmp_path / "root", tmp_path, spec={"fields": fields})
    generate_pairs(config)
    for members, _ in samples(tmp_path / "root").values():
        assert sorted(members) == ["json", "webp", "x0.npy"]
        x0 = decode_array(members["x0.npy"])
        assert x0.dtype == np.float32
        # webp is lossless: exactly the rounded levels
        levels = np.clip(np.round((x0 + 1) * 127.5), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        np.testing.assert_array_equal(decode_image(members["webp"]), levels)


def test_images_alone_are_enough(tmp_path):
    config = toy_config(tmp_path / "root", tmp_path, spec={"fields": {"x0": "none", "image": "jpg", "noise": True}})
    generate_pairs(config)
    assert {tuple(sorted(m)) for m, _ in samples(tmp_path / "root").values()} == {("jpg", "json", "noise.npy", "txt")}


# ---------------------------------------------------------------------------------------------------- bad samples


def poison(monkeypatch, how, ids, *, only_half=False):
    """Let the teacher return rubbish for some samples; with ``only_half`` only until it is run in float32."""
    original, calls = MixtureTeacher.sample, []
    state = {"float32": False}

    def sample(self, *args, sample_ids, **kwargs):
        calls.append(list(sample_ids))
        x0 = original(self, *args, sample_ids=sample_ids, **kwargs)
        for at, sample_id in enumerate(sample_ids):
            if sample_id in ids and not (only_half and state["float32"]):
                x0[at] = how(x0[at])
        return x0

    class Float32:
        def __enter__(self):
            state["float32"] = True

        def __exit__(self, *_):
            state["float32"] = False

    monkeypatch.setattr(MixtureTeacher, "sample", sample)
    monkeypatch.setattr(MixtureTeacher, "float32", lambda self: Float32())
    return calls


def rejections(root):
    return {
        entry["key"]: entry["reason"]
        for path in sorted((root / "commits").glob("*.json"))
        for entry in json.loads(path.read_bytes())["rejected"]
    }


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda x: x * float("nan"), "x0 is not finite"),
        (lambda x: x + 1e6, "x0 is not finite"),  # overflows in the stored float16
        (torch.zeros_like, "x0 is constant"),
    ],
)
def test_a_bad_sample_is_made_again_alone_and_then_listed(tmp_path, monkeypatch, dataset, how, reason):
    calls = poison(monkeypatch, how, {0, 13})
    config = toy_config(tmp_path / "root", tmp_path, runtime={"max_rejected_fraction": 0.05})
    generate_pairs(config)
    assert sorted(ids for ids in calls if len(ids) == 1) == [[0], [13]]
    root = tmp_path / "root"
    assert rejections(root) == {"000000000": reason, "000000013": reason}
    # Everyone else is untouched, and the index keeps a row for the two.
    assert samples(root).keys() == samples(dataset[1]).keys() - {"000000000", "000000013"}
    rows = pq.read_table(root / "manifest/samples-00000.parquet").to_pylist()
    assert [row["key"] for row in rows] == [f"{i:09d}" for i in range(40)]
    assert {row["key"]: row["reason"] for row in rows if row["status"] == "rejected"} == rejections(root)
    sealed = json.loads((root / "SEALED.json").read_bytes())
    assert (sealed["num_samples"], sealed["rejected_by_reason"]) == (38, {reason: 2})


def test_a_sample_that_only_half_precision_spoils_is_saved(tmp_path, monkeypatch, dataset):
    poison(monkeypatch, lambda x: x * float("nan"), {0, 13}, only_half=True)
    config = toy_config(tmp_path / "root", tmp_path)
    generate_pairs(config)
    assert rejections(tmp_path / "root") == {}
    assert samples(tmp_path / "root").keys() == samples(dataset[1]).keys()


def test_too_many_bad_samples_stop_the_run_and_the_rest_is_made_once_the_cause_is_mended(
    tmp_path, monkeypatch, dataset
):
    calls = poison(monkeypatch, torch.zeros_like, range(8, 16))
    config = toy_config(tmp_path / "root", tmp_path)
    with pytest.raises(RunStopped, match=r"shard 1: 1 of its first 1 samples are bad \(x0 is constant: 1\); mend"):
        generate_pairs(config)
    root = tmp_path / "root"
    assert [ids for ids in calls if len(ids) == 1] == [[8]]  # one retry was enough to see it
    assert not (root / "SEALED.json").exists()
    assert not (root / "commits/000001.json").exists()
    monkeypatch.undo()
    generate_pairs(config)
    assert shard_bytes(root) == shard_bytes(dataset[1])


def test_a_report_says_complete_of_nothing_that_is_then_refused(tmp_path, monkeypatch, dataset):
    poison(monkeypatch, torch.zeros_like, {0, 13})
    root = tmp_path / "root"
    generate_pairs(toy_config(root, tmp_path, runtime={"max_rejected_fraction": 0.05}))
    assert json.loads((root / "report.json").read_bytes())["outcome"] == "complete"
    (root / "SEALED.json").unlink()  # as if it had been killed just before
    for _ in range(2):
        with pytest.raises(RunStopped, match=r"2 of 40 samples are rejected .*, not sealed"):
            generate_pairs(toy_config(root, tmp_path, runtime={"max_rejected_fraction": 0.0}))
        assert json.loads((root / "report.json").read_bytes())["outcome"].startswith("stopped: 2 of 40 samples are")
        (root / "commits/000004.json").unlink(missing_ok=True)  # so does a run that makes a last shard first
    assert not (root / "SEALED.json").exists()


def test_rejected_samples_can_be_made_again_once_the_cause_is_mended(tmp_path, monkeypatch, dataset):
    poison(monkeypatch, torch.zeros_like, {0, 13})
    generous = toy_config(tmp_path / "root", tmp_path, runtime={"max_rejected_fraction": 0.05})
    generate_pairs(generous)
    monkeypatch.undo()
    root = tmp_path / "root"
    verify_shards(VerifyShardsConfig(root=str(root), repair=True, redo_rejected=True))
    generate_pairs(toy_config(tmp_path / "root", tmp_path))
    assert rejections(root) == {}
    # The tars with gaps stay, named by no record, until --gc.
    assert shard_bytes(dataset[1]).items() <= shard_bytes(root).items()


def test_rejection_reasons_look_at_each_sample_alone(dataset):
    spec = Dataset.open(Storage.open(str(dataset[1]))).run.spec
    x0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x0[1, 0, 0, 0], x0[2] = float("inf"), 0.5
    image = x0.clone()
    image[3], image[1] = 0.0, 0.0
    condition = torch.zeros(4, 5)
    assert rejection_reasons(TeacherBatch(x0, image, condition), spec, 4) == [
        None,
        "x0 is not finite",
        "x0 is constant",
        "image is constant",
    ]
    assert rejection_reasons(TeacherBatch(x0[:1, :2], None, condition), spec, 1) == ["x0 has a wrong shape"]
    embedded = spec.model_copy(update={"fields": spec.fields.model_copy(update={"text_embedding": True})})
    condition[0, 3] = 1e6  # beyond the stored float16
    assert rejection_reasons(TeacherBatch(x0, None, condition), embedded, 4)[0] == "text embedding is not finite"


def test_a_teacher_that_returns_too_few_samples_loses_none_silently(tmp_path, monkeypatch):
    original = MixtureTeacher.sample
    monkeypatch.setattr(MixtureTeacher, "sample", lambda *args, **kwargs: original(*args, **kwargs)[1:])
    with pytest.raises(RunStopped, match="5 of 5 shards are parked"):
        generate_pairs(toy_config(tmp_path / "root", tmp_path))
    note = json.loads((tmp_path / "root/parked/000002.json").read_bytes())
    assert "the teacher returned 3 times x0 for 4 samples" in note["reason"]


def test_every_prompt_is_encoded_once_in_a_shard(tmp_path, monkeypatch):
    encoded, original = [], MixtureTeacher.encode_prompts
    monkeypatch.setattr(
        MixtureTeacher, "encode_prompts", lambda self, prompts: encoded.extend(prompts) or original(self, prompts)
    )
    generate_pairs(toy_config(tmp_path / "root", tmp_path, layout={"samples_per_shard": 20}, runtime={"batch_size": 3}))
    # 8 pairs a prompt, 20 samples a shard: three prompts each, the third one shared; and the negative prompt.
    assert Counter(encoded) == Counter(PROMPTS) + Counter([PROMPTS[2], ""])


# ------------------------------------------------------------------------------------------------- failing shards


def test_a_shard_that_keeps_failing_is_parked_and_tried_again_by_the_next_run(tmp_path, monkeypatch, dataset):
    original = MixtureTeacher.sample

    def sample(self, *args, sample_ids, **kwargs):
        if 17 in sample_ids:
            raise ValueError("a poisoned row")
        return original(self, *args, sample_ids=sample_ids, **kwargs)

    monkeypatch.setattr(MixtureTeacher, "sample", sample)
    config = toy_config(tmp_path / "root", tmp_path)
    with pytest.raises(RunStopped, match="1 of 5 shards are parked"):
        generate_pairs(config)
    root = tmp_path / "root"
    note = json.loads((root / "parked/000002.json").read_bytes())
    assert note["attempts"] == 3
    assert "ValueError: a poisoned row" in note["reason"]
    assert sorted(p.name for p in (root / "commits").iterdir()) == [f"{i:06d}.json" for i in (0, 1, 3, 4)]
    monkeypatch.undo()
    generate_pairs(config)
    assert shard_bytes(root) == shard_bytes(dataset[1])
    assert not (root / "parked/000002.json").exists()


def test_a_teacher_that_is_not_the_one_of_the_dataset_is_refused(tmp_path, monkeypatch):
    config = toy_config(tmp_path / "root", tmp_path)
    other = config.teacher.model_copy(update={"std": 0.2})
    load = teachers.load
    monkeypatch.setattr(teachers, "load", lambda _, *args, **kwargs: load(other, *args, **kwargs))
    with pytest.raises(UserError, match=r"not the teacher of the dataset: weights_digest is"):
        generate_pairs(config)


# -------------------------------------------------------------------------------------------------------- the card


def test_the_card_shows_what_is_in_the_dataset(dataset):
    _, root = dataset
    text = (root / "README.md").read_text()
    sealed = json.loads((root / "SEALED.json").read_bytes())
    for fact in ("mixture", "edm_heun", "40 in 5 shards", sealed["fingerprint"], sealed["content_sha256"], "`x0.npy`"):
        assert fact in text
    sheet = Image.open(io.BytesIO((root / "contact_sheet.png").read_bytes()))
    assert sheet.size == (6 * 200 + 8, 4 * 234 + 8)
    assert len(list((root / "previews").iterdir())) == len(preview_ids(40)) == 24


@pytest.mark.parametrize("num_samples", [1, 2, 23, 24, 25, 1000, 10**9])
def test_previews_are_spread_evenly(num_samples):
    ids = preview_ids(num_samples)
    assert len(ids) == min(24, num_samples)
    assert ids[0] == 0
    assert ids[-1] == num_samples - 1
    gaps = np.diff(ids)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
