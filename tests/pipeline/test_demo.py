"""The demo, reduced: a Ray job, accelerate launch, an export, an evaluation; then again, and stopped in the middle."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from support import stage
from support.patience import PATIENCE_S
from support.toy import samples

import pipeline.demo as demo_module
from pipeline.demo_record import DemoTimes
from pipeline.noise import noise
from pipeline.shards.dataset import Dataset
from pipeline.shards.members import decode_image
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify
from trainer.checkpoints.checkpoints import newest_folder, read_state
from trainer.initial_weights import InitialWeights

SHORTER_RUN = {
    "data": {"holdout": 4},
    "batch": {"dm": 4, "regression": 4},
    "runtime": {"steps": 4, "log_every": 2, "grid_every": 4, "checkpoint_every": 2},
}
SHORTER = {
    "pairs": {"spec": {"num_samples": 40, "sampler": {"steps": 2}}, "layout": {"samples_per_shard": 20}},
    "train_regression": SHORTER_RUN,
    "train": SHORTER_RUN,
    "evaluate": {
        "teacher_steps": [2],
        "images_per_prompt": 1,
        "latency": {"batch_sizes": [1], "repeats": 1},
    },
}
"""What makes minutes of the built-in configs seconds."""


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, entries in SHORTER.items():
        parent = Path(stage.ROOT) / "configs/builtin" / f"{name}.yaml"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"extends": str(parent), **entries}))
    return folder


@pytest.fixture(scope="module")
def demo(configs, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    ended = stage.run("demo", "--output", output, "--configs", configs)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return output, ended.stdout


def times(folder):
    """When every file that holds a result was written: shards, checkpoints, weights, scores."""
    kinds = (".tar", ".safetensors", ".parquet")
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in kinds}


def pictures(folder):
    """What can be seen: pages are drawn again, from the same numbers."""
    return {path: path.read_bytes() for path in folder.rglob("*.png")}


def test_every_pair_is_there_and_right(demo):
    output, _ = demo
    dataset = Dataset.open(Storage.open(str(output / "pairs")))
    assert dataset.sealed is not None
    findings = verify(dataset)
    assert (findings.problems, findings.num_samples) == ([], 40)


def test_the_student_of_the_report_is_the_exported_pipeline(demo):
    """diffusers alone, with the export and the noise, draws the pictures that were measured."""
    output, _ = demo
    pipeline = DiffusionPipeline.from_pretrained(output / "run/export_ema")
    pipeline.set_progress_bar_config(disable=True)
    drawn = samples(output / "evaluation/images/student")
    for i in (0, 57, 99):
        members, row = drawn[f"{i:09d}"]
        z = torch.from_numpy(noise(1, i, (4, 8, 8)))[None].float()
        picture = pipeline(row["prompt"], latents=z, num_inference_steps=1, guidance_scale=0).images[0]
        difference = np.abs(np.asarray(picture).astype(int) - decode_image(members["png"]).astype(int))
        assert difference.max() <= 1


def test_the_second_run_begins_with_the_student_of_the_first(demo):
    output, _ = demo
    spec = read_state(newest_folder(output / "run")).spec
    assert spec.init_digest == InitialWeights(output / "regression", spec.teacher).digest


def test_the_last_line_names_the_report_and_it_is_there(demo):
    output, out = demo
    last = out.strip().splitlines()[-1]
    assert str(output / "evaluation/report.html") in last
    page = (output / "evaluation/report.html").read_text()
    assert "student" in page
    assert "teacher" in page


def test_the_folder_says_what_each_part_took(demo):
    output, _ = demo
    times = DemoTimes.model_validate_json((output / "demo.json").read_bytes())
    assert list(times.parts) == ["pairs", "regression", "distribution matching", "evaluation"]
    assert all(part.done and part.seconds > 1 for part in times.parts.values())
    assert all(part.peak_memory_bytes > 200 << 20 for part in times.parts.values())  # torch alone is that large
    page = (output / "README.md").read_text()
    linked = re.findall(r"\]\((.+?)\)", page)
    assert linked == ["pairs/README.md", "regression/README.md", "run/README.md", "evaluation/report.html"]
    assert all((output / path).exists() for path in linked)


def test_again_it_computes_nothing(demo, configs):
    output, _ = demo
    before, seen = times(output), pictures(output)
    ended = stage.run("demo", "--output", output, "--configs", configs)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert times(output) == before
    assert pictures(output) == seen


SAVING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), open(sys.argv[1], "w"), sys.exit()))
print(flush=True)
time.sleep(900)
"""
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SAVING!r}, sys.argv[1]])"


def test_what_a_launcher_has_started_may_save_before_it_is_ended(tmp_path):
    command = [sys.executable, "-c", LAUNCHER, tmp_path / "saved"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as launcher:
        launcher.stdout.readline()  # its child has a handler now
        demo_module._end(launcher)
    assert launcher.returncode == -signal.SIGTERM
    assert (tmp_path / "saved").exists()


def test_a_folder_without_configs_is_refused_before_anything_starts(tmp_path):
    ended = stage.run("demo", "--output", tmp_path / "out", "--configs", tmp_path)
    assert ended.returncode == 2
    assert str(tmp_path / "pairs.yaml") in ended.stderr
    assert not (tmp_path / "out").exists()


def is_alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two
        return False


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.faults), signal.SIGINT])
def test_stopped_at_work_it_leaves_no_process(configs, tmp_path, number):
    process = stage.start("demo", "--output", tmp_path / "out", "--configs", configs)
    try:
        stage.wait_for_commits(tmp_path / "out/pairs", 1, process)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while alive := [one for one in family if is_alive(one)]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.1)
        assert process.returncode == 130
    finally:
        stage.kill(process)
