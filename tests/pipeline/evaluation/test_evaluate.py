"""An evaluation's numbers are what the libraries give by themselves, however often it was interrupted."""

import base64
import csv
import json
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from cleanfid import fid
from support import evaluation, tiny_sd
from support.patience import PATIENCE_S
from support.pictures import pictures as make_pictures
from support.pictures import save_pictures
from support.toy import samples

from configs.errors import RunStopped, UserError
from configs.evaluate_schema import LatencyConfig
from configs.schema import PairsRuntime
from pipeline.evaluation import evaluate as module
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.results import Timing
from pipeline.evaluation.systems import build_systems
from pipeline.evaluation.timing import Stopwatch
from pipeline.generate import generate_pairs
from pipeline.metrics.paired import pixel_distance
from pipeline.noise import noise
from pipeline.prompts import prepare_prompts
from pipeline.scoring.score_worker import ScoreWorker
from pipeline.shards.members import decode_image, to_uint8
from pipeline.teachers.stable_diffusion import StableDiffusionTeacher

SYSTEMS = ["teacher-3", "teacher-1", "student"]


def report(output):
    return json.loads((output / "report.json").read_bytes())


def without_times(output):
    """The systems of a report, and what their numbers depend on."""
    found = report(output)
    return [{**system, "timings": None} for system in found["systems"]], found["protocol"], found["grid"]


def numbers(output):
    return {system["name"]: system["numbers"] for system in report(output)["systems"]}


def pictures(output, system):
    found = samples(output / "images" / system)
    return [decode_image(members["png"]) for members, _ in found.values()]


@pytest.fixture
def judge(world):
    import open_clip
    from PIL import Image

    name = f"local-dir:{world / 'judge'}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)

    class Judge:
        @torch.no_grad()
        def images(self, arrays):
            return model.eval().encode_image(torch.stack([preprocess(Image.fromarray(a)) for a in arrays]))

        @torch.no_grad()
        def texts(self, prompts):
            return model.eval().encode_text(tokenizer(prompts))

    return Judge()


def test_the_rows_are_the_teacher_from_many_steps_to_few_and_the_student(finished):
    rows = [(system["name"], system["evaluations"]) for system in report(finished)["systems"]]
    assert rows == [("teacher-3", 3), ("teacher-1", 1), ("student", 1)]
    assert {system["num_images"] for system in report(finished)["systems"]} == {evaluation.NUM_IMAGES}


def test_a_student_image_is_that_of_its_own_diffusers_pipeline(world, finished):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(world / "student")
    pipeline.set_progress_bar_config(disable=True)
    found = pictures(finished, "student")
    for i in (0, 9, 23):
        z = torch.from_numpy(noise(1, i, (4, 8, 8))).float()[None]
        prompt = evaluation.PROMPTS[i // evaluation.PER_PROMPT]
        (image,) = pipeline(prompt, latents=z, num_inference_steps=1, guidance_scale=0, output_type="pt").images
        expected = to_uint8(2 * image.numpy() - 1).astype(int)
        assert abs(found[i].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("system", SYSTEMS)
def test_numbers_are_those_of_the_libraries_alone(world, finished, judge, system):
    found, images = numbers(finished)[system], pictures(finished, system)
    features, real = judge.images(images).numpy(), evaluation.real_features(world)
    moments = [(f.mean(0, dtype=np.float64), np.cov(f, rowvar=False)) for f in (features, real)]
    assert found["frechet_distance"] == pytest.approx(fid.frechet_distance(*moments[0], *moments[1]), abs=1e-6)

    prompts = np.repeat(evaluation.PROMPTS, evaluation.PER_PROMPT).tolist()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    texts = judge.texts(prompts).numpy()
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    assert found["clip_score"] == pytest.approx((unit * texts).sum(1).mean(), abs=1e-6)

    captions = judge.texts(evaluation.PROMPTS).numpy()
    chosen = (unit @ (captions / np.linalg.norm(captions, axis=1, keepdims=True)).T).argmax(1)
    right = [evaluation.PROMPTS[at].split()[2] == prompt.split()[2] for at, prompt in zip(chosen, prompts, strict=True)]
    assert found["second_accuracy"] == pytest.approx(np.mean(right))

    of_prompts = unit.reshape(-1, evaluation.PER_PROMPT, unit.shape[1])
    distances = 1 - np.einsum("pid,pjd->pij", of_prompts, of_prompts)
    pairs = evaluation.PER_PROMPT * (evaluation.PER_PROMPT - 1)
    assert found["diversity"] == pytest.approx((distances.sum((1, 2)) / pairs).mean(), abs=1e-6)

    if system != "teacher-3":
        teacher = pictures(finished, "teacher-3")
        assert found["paired_distance"] == pytest.approx(
            pixel_distance(np.stack(images), np.stack(teacher)).mean(), abs=1e-6
        )
        assert found["paired_distance"] > 0
    else:
        assert "paired_distance" not in found


def test_the_same_again_measures_nothing_and_says_the_same(world, finished, tmp_path, monkeypatch, capsys):
    output = shutil.copytree(finished, tmp_path / "tiny")
    before = report(output)["systems"]
    tars = {path: path.stat().st_mtime_ns for path in output.rglob("*.tar")}
    evaluate(evaluation.config(world, output))
    assert report(output)["systems"] == before  # the times, too
    assert tars == {path: path.stat().st_mtime_ns for path in output.rglob("*.tar")}
    assert "measuring" not in capsys.readouterr().out


def test_interrupted_at_every_place_equals_straight(world, finished, tmp_path, monkeypatch):
    output, config = tmp_path / "tiny", evaluation.config(world, tmp_path / "tiny")
    generate, make, numbers_of = module.generate_pairs, module.Scores.make, module.Yardstick.numbers

    def second(call, name):
        """A call that stops the second time it is made for ``name``."""
        calls = []

        def stopping(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise RunStopped(name)
            return call(*arguments)

        return stopping

    for owner, name, call in (
        (module, "generate_pairs", generate),
        (module.Scores, "make", make),
        (module.Yardstick, "numbers", numbers_of),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, second(call, name))
            with pytest.raises(RunStopped, match=name):
                evaluate(config)
        assert not (output / "report.json").exists()
    evaluate(config)
    assert without_times(output) == without_times(finished)


def test_a_signal_while_systems_are_timed_is_heeded_before_the_next_batch(world, finished, tmp_path, monkeypatch):
    output = shutil.copytree(finished, tmp_path / "tiny")
    config = evaluation.config(world, output, latency={"batch_sizes": [1], "warmup": 0, "repeats": 50})
    sample, calls = StableDiffusionTeacher.sample, []

    def signalled(*arguments, **options):
        calls.append(arguments)
        signal.raise_signal(signal.SIGTERM)
        return sample(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(StableDiffusionTeacher, "sample", signalled)
        with pytest.raises(RunStopped, match="on request"):
            evaluate(config)
    assert len(calls) == 1
    evaluate(evaluation.config(world, output))
    assert without_times(output) == without_times(finished)


def devices(output):
    return [{timing["device"] for timing in system["timings"]} for system in report(output)["systems"]]


def asks_for_a_gpu(world, output):
    """The same evaluation for workers with GPUs; its images are drawn, so none has to come up."""
    runtime = {**evaluation.settings(world, output)["runtime"], "gpus_per_actor": 1}
    return evaluation.config(world, output, runtime=runtime)


def test_what_a_machine_cannot_time_the_next_one_times(world, finished, tmp_path, monkeypatch, capsys):
    output = shutil.copytree(finished, tmp_path / "tiny")
    shutil.rmtree(output / "results")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    evaluate(asks_for_a_gpu(world, output))
    assert devices(output) == [set(), set(), set()]
    capsys.readouterr()
    evaluate(evaluation.config(world, output, keep_images=False))
    assert devices(output) == devices(finished) == [{"cpu, 1 threads, float32"}] * 3
    assert without_times(output) == without_times(finished)
    assert "measuring" not in capsys.readouterr().out  # its numbers were kept


def test_times_of_another_device_are_taken_again_where_there_is_one(world, finished, tmp_path, monkeypatch):
    output = shutil.copytree(finished, tmp_path / "tiny")
    elsewhere = output / "results" / "teacher-3.json"
    elsewhere.write_text(elsewhere.read_text().replace("cpu, 1 threads", "NVIDIA H100"))
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        evaluate(asks_for_a_gpu(world, output))  # none to put in their place
    mixed = [{"NVIDIA H100, float32"}, {"cpu, 1 threads, float32"}, {"cpu, 1 threads, float32"}]
    assert devices(output) == mixed
    others = report(output)["systems"][1:]
    evaluate(evaluation.config(world, output))
    assert devices(output) == devices(finished)
    assert report(output)["systems"][1:] == others  # their times were of this device
    assert without_times(output) == without_times(finished)


def test_times_of_a_compiled_network_are_others_on_the_same_device():
    def stopwatch(**changes):
        return Stopwatch(LatencyConfig(), PairsRuntime(**changes), lambda: None)

    def timed(device):
        return [Timing(batch_size=1, device=device, total=(1, 1, 1), text_encoder=0, network=1, decoder=0)]

    eager, both = timed("cpu, 1 threads, bfloat16"), timed("cpu, 1 threads, compiled, channels last, bfloat16")
    for settings, expected in (
        ({}, (True, False)),
        ({"compile": True}, (False, False)),
        ({"compile": True, "channels_last": True}, (False, True)),
    ):
        assert tuple(map(stopwatch(**settings).has_timed, (eager, both))) == expected
    assert not stopwatch().has_timed([*eager, *both])


def test_a_shard_is_scored_while_the_next_is_drawn(world, tmp_path, monkeypatch):
    sample, measure = StableDiffusionTeacher.sample, ScoreWorker.run
    drawn, next_is_drawn = [], threading.Event()

    def sampling(*arguments, sample_ids, **options):
        drawn.append(min(sample_ids))
        if min(sample_ids) >= 8:  # of the second shard
            next_is_drawn.set()
        return sample(*arguments, sample_ids=sample_ids, **options)

    def measuring(worker, shard, attempt=1):
        assert next_is_drawn.wait(PATIENCE_S), "scored before anything else went on"
        return measure(worker, shard, attempt)

    monkeypatch.setattr(StableDiffusionTeacher, "sample", sampling)
    monkeypatch.setattr(ScoreWorker, "run", measuring)
    monkeypatch.setattr(module.Scores, "make", lambda *_: None)  # all tables are there when all is drawn
    evaluate(evaluation.config(world, tmp_path / "tiny", num_images=16, teacher_steps=[1], latency=None))
    assert len(drawn) == 8


def test_a_shard_that_was_drawn_and_not_scored_is_scored_by_the_same_command(world, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "tiny")
    lost = {path: path.read_bytes() for path in output.glob("images/teacher-1/scores/*/000001-*.parquet")}
    assert len(lost) == 2  # features and CLIP scores
    for path in lost:
        path.unlink()
    evaluate(evaluation.config(world, output))
    assert {path: path.read_bytes() for path in lost} == lost
    assert without_times(output) == without_times(finished)


def test_another_seed_gives_other_numbers(world, finished, tmp_path):
    evaluate(evaluation.config(world, tmp_path / "tiny", seed=2, latency=None, teacher_steps=[1]))
    assert numbers(tmp_path / "tiny")["student"] != numbers(finished)["student"]


def test_images_can_be_let_go(world, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "tiny")
    for _ in range(2):
        evaluate(evaluation.config(world, output, keep_images=False))
        assert not list((output / "images").rglob("*.tar"))
        assert without_times(output) == without_times(finished)
    with pytest.raises(RunStopped, match=r"if keep_images has removed it, remove \S+/images/teacher-\d as well"):
        evaluate(evaluation.config(world, output, labels=None))


def test_what_depends_on_a_setting_is_measured_again_when_it_changes(world, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "tiny")
    real = save_pictures(tmp_path / "real", make_pictures(40, 16, 16, seed=1))
    evaluate(evaluation.config(world, output, reference=str(real), latency=None))
    for system, found in numbers(output).items():
        before = numbers(finished)[system]
        changed = {name for name in before if found[name] != before[name]}
        assert changed == {"frechet_distance", "kernel_distance"}


def test_images_drawn_elsewhere_stand_for_the_teacher(world, finished, tmp_path):
    output, pairs = tmp_path / "tiny", finished / "images" / "teacher-3"
    evaluate(evaluation.config(world, output, pairs=str(pairs), latency=None))
    assert not (output / "images" / "teacher-3").exists()
    assert without_times(output) == without_times(finished)


def run_of(world, folder, teacher, fingerprint):
    """What a training run leaves, as far as an evaluation looks."""
    from configs.schema import StableDiffusionTeacherConfig
    from pipeline import teachers

    identity = teachers.identify(StableDiffusionTeacherConfig(path=str(teacher))).model_dump(mode="json")
    data = [{"fingerprint": fingerprint, "weight": 1.0}]
    empty = {name: {} for name in ("loss", "student", "optimizer", "batch")}
    spec = {**empty, "teacher": identity, "data": data, "precision": "float32", "seed": 0}
    about = {"spec": spec, "fingerprint": "f", "created": "now", "code_revision": "r"}
    shutil.copytree(world / "student", folder / "export_ema")
    (folder / "run.json").write_text(json.dumps(about))
    save_pictures(folder / "drawn", make_pictures(1))
    next((folder / "drawn").iterdir()).rename(folder / "curves.png")
    (folder / "metrics.jsonl").write_text('{"step": 50}\n{"step": 300}\n{"ste')
    return folder


def test_a_run_directory_gives_its_average_and_is_described(world, finished, tmp_path):
    run = run_of(world, tmp_path / "run", world / "teacher", "0" * 64)
    output = tmp_path / "tiny"
    evaluate(evaluation.config(world, output, student=str(run), teacher_steps=[1], latency=None, labels=None))
    assert numbers(output)["student"]["frechet_distance"] == numbers(finished)["student"]["frechet_distance"]
    assert (report(output)["run"]["steps"], report(output)["run"]["code_revision"]) == (300, "r")
    curves = (run / "curves.png").read_bytes()
    assert (output / "curves.png").read_bytes() == curves
    assert base64.b64encode(curves).decode() in (output / "report.html").read_text()
    assert "(curves.png)" in (output / "report.md").read_text()


def teacher_as_jpg(world, output):
    """The very pairs of the teacher with most steps, but for how their pictures are stored."""
    config = evaluation.config(world, output)
    prepare_prompts(config.prompts, str(output.with_suffix(".parquet")))
    pairs = build_systems(config, str(output.with_suffix(".parquet")))[0].pairs
    fields = pairs.spec.fields.model_copy(update={"image": "jpg"})
    spec = pairs.spec.model_copy(update={"fields": fields})
    generate_pairs(pairs.model_copy(update={"output": str(output), "spec": spec}))
    return output


def wrong(world, tmp_path, finished):
    """Name -> (changes, what the line says)."""
    short, partial = tmp_path / "short.csv", tmp_path / "labels.csv"
    short.write_text("caption,colour\na red bag\n")
    with partial.open("w", newline="") as file:
        csv.writer(file).writerows([("caption", "first"), ("a red bag", "red")])
    (tmp_path / "empty").mkdir()
    teacher = finished / "images" / "teacher-3"
    learnt = json.loads((teacher / "run.json").read_bytes())["fingerprint"]
    stranger = run_of(world, tmp_path / "stranger", world / "other", "0" * 64)
    pupil = run_of(world, tmp_path / "pupil", world / "teacher", learnt)
    lossy = teacher_as_jpg(world, tmp_path / "jpg")
    return {
        "too few images": ({"num_images": 12}, "num_images: 12 images are too few for FID with 12 features"),
        "no student": ({"student": str(tmp_path / "nobody")}, "student: there is no folder"),
        "no export": ({"student": str(tmp_path / "empty")}, "has neither export_ema nor export"),
        "another teacher's": ({"student": str(stranger)}, "name the student's teacher"),
        "learnt pairs": ({"student": str(pupil), "pairs": str(teacher)}, "was trained on"),
        "other pairs": ({"seed": 5, "pairs": str(teacher)}, "seed is 1 there, 5 here"),
        "lossy pairs": ({"pairs": str(lossy)}, "has jpg images, whose error would count as the teacher's"),
        "no real images": ({"reference": str(tmp_path / "empty")}, "holds no image"),
        "no reference": ({"reference": str(tmp_path / "gone")}, "there is no"),
        "no statistics": ({"reference": str(tmp_path / "gone.npz")}, "no such file of reference statistics"),
        "not Inception's": (
            {"reference": "cleanfid:cifar10/32/train"},
            "has Inception's features, and features.kind is open_clip_features",
        ),
        "a prompt without a label": ({"labels": str(partial)}, "has no caption 'a blue bag'"),
        "a short row": ({"labels": str(short)}, "not 2 fields"),
        "no weights": ({"clip": {"model": "local-dir:/nowhere"}}, "has no open_clip_config.json"),
        "too many images": ({"num_images": 25, "latency": None}, "6 prompts x 4 pairs_per_prompt give 24"),
    }


def test_mistakes_are_found_before_an_image_is_drawn(world, finished, tmp_path):
    for name, (changes, line) in wrong(world, tmp_path, finished).items():
        output = tmp_path / "out"
        with pytest.raises(UserError) as caught:
            evaluate(evaluation.config(world, output, **changes))
        assert line in str(caught.value), name
        assert "\n" not in str(caught.value), name
        assert not list(output.rglob("*.tar")), name


def test_a_student_that_has_changed_needs_another_output(world, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "tiny")
    student = tiny_sd.build(tmp_path / "student", seed=3)
    with pytest.raises(UserError, match=r"spec.teacher.weights_digest is .* there, .* here"):
        evaluate(evaluation.config(world, output, student=str(student)))
