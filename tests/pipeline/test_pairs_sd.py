"""Pairs of a Stable Diffusion teacher: what diffusers' own pipeline makes of the same noise and prompts, in shards."""

import io
import json
import shutil

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from support.sd_pairs import ANCESTRAL, IDS, LONG, NEGATIVE, PAIRS_PER_PROMPT, PROMPTS, SEED, sd_config
from support.tiny_sd import TOKENS, build
from support.toy import files, shard_bytes

from configs.schema import StableDiffusionTeacherConfig, VerifyShardsConfig
from pipeline import shard_maker, teachers
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import verify_shards
from pipeline.noise import noise, noise_digest
from pipeline.sampling import sample_batch
from pipeline.shard_maker import preview_ids
from pipeline.shards.dataset import Dataset
from pipeline.shards.members import decode_array, decode_image, split_members
from pipeline.shards.storage import Storage
from pipeline.teachers.schedulers import sample_generators
from pipeline.teachers.stable_diffusion import StableDiffusionTeacher

LATENTS = {"x0": "latent", "image": "none"}
HALF = 2**-10
"""Float16 has 11 significant bits: rounding is at most half of this, relative; the other half is for the networks."""


def samples(root):
    """Members and index row of every stored sample, in the order of their ids."""
    found = []
    for path in sorted((root / "commits").glob("*.json")):
        commit = json.loads(path.read_bytes())
        tar = (root / commit["path"]).read_bytes()
        for row in pq.read_table(root / commit["index_path"]).to_pylist():
            if row["status"] == "ok":
                found.append((split_members(tar[row["offset"] : row["offset"] + row["length"]]), row))
    return found


def x0_of(root):
    """The stored latents, (samples, 4, 8, 8), float32."""
    return np.stack([decode_array(members["x0.npy"]) for members, _ in samples(root)]).astype(np.float32)


def relative_rms(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def dataset(sd, tmp_path_factory):
    """Latents, pictures and embeddings of the float32 teacher."""
    folder = tmp_path_factory.mktemp("pairs")
    config = sd_config(folder / "root", folder, sd)
    generate_pairs(config)
    return config, folder / "root"


@pytest.fixture(scope="module")
def latents(sd, tmp_path_factory):
    """The shape of configs/sd15/pairs.yaml: latents and no pictures."""
    folder = tmp_path_factory.mktemp("latents")
    generate_pairs(sd_config(folder / "root", folder, sd, spec={"fields": LATENTS}))
    return folder / "root"


@pytest.fixture(scope="module")
def reference(sd):
    """What StableDiffusionPipeline makes of noise(SEED, i) and the prompts: latents, and levels of the pictures."""

    def run(scheduler, steps):
        pipeline = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)

        def images(kind):
            return pipeline(
                prompt=[PROMPTS[i // PAIRS_PER_PROMPT] for i in IDS],
                negative_prompt=[NEGATIVE] * len(IDS),
                guidance_scale=3.0,
                num_inference_steps=steps,
                latents=torch.from_numpy(np.stack([noise(SEED, i, (4, 8, 8)) for i in IDS])).float(),
                generator=sample_generators(SEED, IDS),
                output_type=kind,
            ).images

        return images("latent").numpy(), 255 * images("np")

    return run


# -------------------------------------------------------------------------------------------- what is in a sample


def test_the_samples_are_those_of_the_diffusers_pipeline(dataset, reference):
    _, root = dataset
    x0, levels = reference("DDIMScheduler", 3)
    found = samples(root)
    assert [int(row["key"]) for _, row in found] == IDS
    for i, (members, row) in enumerate(found):
        assert sorted(members) == ["json", "noise.npy", "png", "text_embedding.npy", "txt", "x0.npy"]
        start = noise(SEED, i, (4, 8, 8))
        np.testing.assert_array_equal(decode_array(members["noise.npy"]), start)
        assert row["noise_digest"] == noise_digest(start)
        assert members["txt"].decode() == row["prompt"] == PROMPTS[i // PAIRS_PER_PROMPT]
        stored = decode_array(members["x0.npy"])
        assert stored.dtype == np.float16
        np.testing.assert_allclose(stored, x0[i], rtol=HALF, atol=1e-5)
        assert np.abs(decode_image(members["png"]) - levels[i]).max() <= 1
    assert min(relative_rms(x0[i], x0[j]) for i in IDS for j in range(i)) > 0.1  # none would pass for another one


def test_the_text_embedding_is_what_the_encoder_says(dataset, sd):
    _, root = dataset
    pipeline = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None, requires_safety_checker=False)
    expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    for i, (members, _) in enumerate(samples(root)):
        stored = decode_array(members["text_embedding.npy"])
        assert (stored.shape, stored.dtype) == ((TOKENS, 32), np.float16)
        np.testing.assert_allclose(stored, expected[i // PAIRS_PER_PROMPT].detach(), rtol=HALF, atol=1e-5)


def test_a_prompt_longer_than_the_tokenizer_is_counted(dataset):
    _, root = dataset
    for _, row in samples(root):
        assert row["prompt_truncated"] == (row["prompt"] == LONG)
    assert json.loads((root / "SEALED.json").read_bytes())["num_truncated"] == PAIRS_PER_PROMPT


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_changes_rounding_only(latents, sd, tmp_path, batch_size):
    root = tmp_path / "root"
    generate_pairs(sd_config(root, tmp_path, sd, spec={"fields": LATENTS}, runtime={"batch_size": batch_size}))
    ours, theirs = samples(root), samples(latents)
    assert [int(row["key"]) for _, row in ours] == IDS
    for (members, _), (others, _) in zip(ours, theirs, strict=True):
        assert sorted(members) == ["json", "noise.npy", "txt", "x0.npy"]
        assert all(members[same] == others[same] for same in ("json", "noise.npy", "txt"))
    np.testing.assert_allclose(x0_of(root), x0_of(latents), rtol=HALF, atol=1e-4)


def test_pixels_are_the_decoded_latents(latents, sd, tmp_path):
    root = tmp_path / "root"
    fields = {"x0": "pixels", "x0_dtype": "float32", "image": "webp"}
    generate_pairs(sd_config(root, tmp_path, sd, spec={"fields": fields}))
    teacher = teachers.load(StableDiffusionTeacherConfig(path=str(sd)), torch.device("cpu"))
    expected = teacher.decode(torch.from_numpy(x0_of(latents))).numpy()
    np.testing.assert_allclose(x0_of(root), expected, atol=5e-3)  # latents in float16
    for pixels, (members, _) in zip(x0_of(root), samples(root), strict=True):
        levels = np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        np.testing.assert_array_equal(decode_image(members["webp"]), levels)


# ----------------------------------------------------------------------------------------- latents and no pictures


def test_without_pictures_only_previews_are_decoded(latents, sd, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_maker, "NUM_PREVIEWS", 4)
    decoded, original = [], StableDiffusionTeacher.decode

    def decode(self, x0):
        decoded.extend(x0.numpy().copy())
        return original(self, x0)

    monkeypatch.setattr(StableDiffusionTeacher, "decode", decode)
    root = tmp_path / "root"
    generate_pairs(sd_config(root, tmp_path, sd, spec={"fields": LATENTS}))
    assert shard_bytes(root) == shard_bytes(latents)  # previews decide nothing
    shown = preview_ids(len(IDS))
    assert len(shown) == 4
    assert {x0.astype(np.float16).tobytes() for x0 in decoded} == {
        x0.astype(np.float16).tobytes() for x0 in x0_of(root)[shown]
    }
    assert len(decoded) == 4
    assert sorted(path.name for path in (root / "previews").iterdir()) == [f"{i:09d}.png" for i in shown]


def test_previews_are_the_pictures(dataset, latents):
    """The same previews, whether the pictures are stored or not."""
    assert files(latents / "previews") == files(dataset[1] / "previews")
    for i, (members, _) in enumerate(samples(dataset[1])):
        preview = np.asarray(Image.open(io.BytesIO((latents / f"previews/{i:09d}.png").read_bytes())))
        np.testing.assert_array_equal(preview, decode_image(members["png"]))


@pytest.mark.parametrize("fields", [LATENTS, {"x0": "latent", "image": "png"}], ids=["latents", "png"])
def test_a_picture_that_is_not_finite_matters_only_where_it_is_stored(latents, sd, tmp_path, monkeypatch, fields):
    monkeypatch.setattr(
        StableDiffusionTeacher, "decode", lambda self, x0: torch.full((len(x0), 3, 16, 16), float("nan"))
    )
    root = tmp_path / "root"
    config = sd_config(root, tmp_path, sd, spec={"fields": fields}, runtime={"max_rejected_fraction": 1.0})
    generate_pairs(config)
    sealed = json.loads((root / "SEALED.json").read_bytes())
    if fields is LATENTS:
        assert sealed["num_rejected"] == 0
        assert shard_bytes(root) == shard_bytes(latents)
        assert not any(row["made_in_float32"] for _, row in samples(root))
    else:
        assert sealed["rejected_by_reason"] == {"image is not finite": len(IDS)}
        assert sealed["num_samples"] == 0
    assert not (root / "previews").exists()


# ------------------------------------------------------------------------------------------------- half precision


@pytest.fixture(scope="module")
def half(sd, tmp_path_factory):
    """The dataset of the bfloat16 teacher."""
    folder = tmp_path_factory.mktemp("half")
    generate_pairs(sd_config(folder / "root", folder, sd, dtype="bfloat16"))
    return folder / "root"


def test_a_half_precision_teacher_is_another_one_and_gives_nearly_the_same(dataset, half):
    ours, theirs = x0_of(half), x0_of(dataset[1])
    differences = [relative_rms(one, other) for one, other in zip(ours, theirs, strict=True)]
    assert 1e-4 < min(differences) <= max(differences) < 0.1
    records = [json.loads((root / "run.json").read_bytes()) for root in (half, dataset[1])]
    assert records[0]["fingerprint"] != records[1]["fingerprint"]
    assert [record["spec"]["teacher"]["dtype"] for record in records] == ["bfloat16", "float32"]
    assert not any(row["made_in_float32"] for _, row in samples(half))


SPOILED = {2, 9}


@pytest.fixture(scope="module")
def saved(sd, tmp_path_factory):
    """The dataset of a bfloat16 teacher that spoils two samples for as long as its networks are in bfloat16."""
    folder = tmp_path_factory.mktemp("saved")
    original = StableDiffusionTeacher.sample

    def sample(self, *args, sample_ids, **kwargs):
        x0 = original(self, *args, sample_ids=sample_ids, **kwargs)
        if self.denoiser.network_dtype == torch.bfloat16:
            x0[[i in SPOILED for i in sample_ids]] = float("nan")
        return x0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusionTeacher, "sample", sample)
        generate_pairs(sd_config(folder / "root", folder, sd, dtype="bfloat16"))
    return folder / "root"


def test_what_only_half_precision_spoils_is_made_again_in_float32(saved, half, sd):
    assert json.loads((saved / "SEALED.json").read_bytes())["num_rejected"] == 0
    ours = samples(saved)
    assert {i for i, (_, row) in enumerate(ours) if row["made_in_float32"]} == SPOILED
    table = pq.read_table(saved / "manifest/samples-00000.parquet").to_pylist()
    assert {int(row["key"]) for row in table if row["made_in_float32"]} == SPOILED
    # The others have not noticed: afterwards the networks are in bfloat16 again, bit by bit.
    theirs = samples(half)
    assert all(ours[i][0] == theirs[i][0] for i in IDS if i not in SPOILED)
    # And the two are what the very same weights, widened, make of their noise alone.
    teacher = teachers.load(StableDiffusionTeacherConfig(path=str(sd), dtype="bfloat16"), torch.device("cpu"))
    spec = Dataset.open(Storage.open(str(saved))).run.spec
    for i in SPOILED:
        with teacher.float32():
            condition = teacher.encode_prompts([PROMPTS[i // PAIRS_PER_PROMPT]])
            unconditional = teacher.encode_prompts([NEGATIVE])
            x0 = sample_batch(teacher, spec, noise(SEED, i, (4, 8, 8))[None], condition, unconditional, [i])
            levels = (teacher.decode(x0)[0].permute(1, 2, 0).numpy() + 1) * 127.5
        members = ours[i][0]
        np.testing.assert_allclose(decode_array(members["x0.npy"]), x0[0], rtol=HALF, atol=1e-5)
        np.testing.assert_allclose(decode_array(members["text_embedding.npy"]), condition[0], rtol=HALF, atol=1e-5)
        assert np.abs(decode_image(members["png"]) - levels.clip(0, 255)).max() <= 1


# ------------------------------------------------------------------------------------------------ reproducibility


def test_added_noise_derives_from_seed_and_sample(sd, tmp_path, reference):
    roots = [tmp_path / name for name in ("once", "again", "alone")]
    for root, batch_size in zip(roots, (4, 4, 1), strict=True):
        spec = {"sampler": ANCESTRAL, "fields": LATENTS}
        generate_pairs(sd_config(root, tmp_path, sd, spec=spec, runtime={"batch_size": batch_size}))
    assert shard_bytes(roots[0]) == shard_bytes(roots[1])
    np.testing.assert_allclose(x0_of(roots[2]), x0_of(roots[0]), rtol=HALF, atol=1e-4)
    np.testing.assert_allclose(
        x0_of(roots[0]), reference("EulerAncestralDiscreteScheduler", 3)[0], rtol=HALF, atol=1e-4
    )


def test_what_is_made_again_has_the_same_bytes(dataset, tmp_path):
    config, root = dataset
    copy = shutil.copytree(root, tmp_path / "root")
    (copy / "SEALED.json").unlink()
    commit = json.loads((copy / "commits/000001.json").read_bytes())
    for path in ("commits/000001.json", commit["path"], commit["index_path"]):
        (copy / path).unlink()
    kept = (copy / "commits/000000.json").read_bytes()
    generate_pairs(config.model_copy(update={"output": str(copy)}))
    assert shard_bytes(copy) == shard_bytes(root)
    assert files(copy / "index") == files(root / "index")
    assert (copy / "commits/000000.json").read_bytes() == kept
    assert (copy / "SEALED.json").exists()


@pytest.mark.parametrize("name", ["dataset", "half", "saved"])
def test_the_teacher_run_again_agrees(request, name, capsys):
    found = request.getfixturevalue(name)
    root = found[1] if name == "dataset" else found
    # Batches are cut in other places, which bfloat16 notices.
    tolerance = HALF if name == "dataset" else 0.02
    verify_shards(VerifyShardsConfig(root=str(root), deep=len(IDS), tolerance=tolerance))
    assert f"teacher run again on {len(IDS)} samples" in capsys.readouterr().out


def test_the_teacher_run_again_agrees_on_pictures_alone(sd, tmp_path, capsys):
    root = tmp_path / "root"
    generate_pairs(sd_config(root, tmp_path, sd, spec={"fields": {"x0": "none", "image": "jpg"}}))
    verify_shards(VerifyShardsConfig(root=str(root), deep=len(IDS)))
    assert f"teacher run again on {len(IDS)} samples" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ plan


def test_a_plan_counts_both_branches_and_every_call_of_the_scheduler(sd, tmp_path, capsys):
    pndm = {"name": "diffusers", "scheduler": "PNDMScheduler", "steps": 4}
    config = sd_config(tmp_path / "root", tmp_path, sd, spec={"sampler": pndm})
    generate_pairs(config.model_copy(update={"plan": True}))
    printed = capsys.readouterr().out
    # Four steps are five calls with PNDM, each for both branches of guidance.
    assert "teacher evaluations  150 (10 a sample)" in printed
    sizes = {
        line.split()[0]: int(line.split()[1].replace(",", ""))
        for line in printed.splitlines()
        if "bytes a sample" in line
    }
    assert sizes.keys() == {"json", "noise.npy", "x0.npy", "text_embedding.npy", "txt", "png", "all"}
    # Tar header, array header of 128 bytes, float16 values; in blocks of 512.
    assert sizes["noise.npy"] == sizes["x0.npy"] == 512 + 1024
    assert sizes["text_embedding.npy"] == 512 + 2048
    assert sizes["all"] == sum(sizes.values()) - sizes["all"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt"]
