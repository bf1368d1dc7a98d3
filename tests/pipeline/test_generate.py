"""From a config to a finished dataset: what is refused, planned, resumed and mended on the way."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from support.forge import flip
from support.toy import PROMPTS, files, samples, shard_bytes, toy_config

from configs.errors import UserError
from pipeline.generate import generate_pairs
from pipeline.pairs import PairWorker
from pipeline.processes import process_identity
from pipeline.prompts import PromptTable, prepare_prompts
from pipeline.shards.storage import Storage


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    config = toy_config(folder / "root", folder)
    generate_pairs(config)
    return config, folder / "root"


# ------------------------------------------------------------------------------------------------ mistakes of users


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"output": "relative/dir"}, "relative/dir: not an absolute path"),
        ({"prompts": {"path": "/nowhere/prompts.txt"}}, "/nowhere/prompts.txt"),
        ({"spec": {"num_samples": 41}}, "spec.num_samples: 41 asked.*give 40"),
        ({"spec": {"fields": {"x0": "latent"}}}, "latent"),
        ({"spec": {"sampler": {"name": "diffusers", "scheduler": "DDIMScheduler"}}}, "sampler"),
        ({"runtime": {"gpus_per_actor": 1}}, "runtime.gpus_per_actor: 1 asked, this machine has no GPU"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, sections, message, monkeypatch):
    sections = dict(sections)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        generate_pairs(toy_config(sections.pop("output", tmp_path / "root"), tmp_path, **sections))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt"]


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "thesis.tex").write_text("three years of work")
    with pytest.raises(UserError, match="not empty and not a pair dataset"):
        generate_pairs(toy_config(tmp_path / "root", tmp_path))
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["thesis.tex"]


def test_a_changed_spec_is_refused_with_the_fields_that_differ(dataset, tmp_path):
    _, root = dataset
    before = files(root)
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:-1], "a white ring"]) + "\n")
    changed = toy_config(
        root, tmp_path, spec={"guidance_scale": 2.0}, teacher={"std": 0.2}, layout={"samples_per_shard": 16}
    )
    with pytest.raises(UserError) as caught:
        generate_pairs(changed)
    message = str(caught.value)
    for name in ("spec.guidance_scale is 1.0 there, 2.0 here", "spec.teacher.weights_digest", "spec.prompts_digest"):
        assert name in message
    assert "layout.samples_per_shard is 8 there, 16 here" in message
    assert files(root) == before


def test_runtime_settings_may_change_between_runs(dataset, capsys):
    config, _ = dataset
    generate_pairs(config.model_copy(update={"runtime": config.runtime.model_copy(update={"batch_size": 3})}))
    assert "nothing to do" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ plan


def test_a_plan_counts_and_writes_nothing(tmp_path, capsys):
    config = toy_config(tmp_path / "root", tmp_path, spec={"guidance_scale": 3.0})
    generate_pairs(config.model_copy(update={"plan": True}))
    printed = capsys.readouterr().out
    assert "samples              40 (8 for each of 5 prompts)" in printed
    assert "shards               5 of 8 samples" in printed
    # Heun with 4 levels: 2 * 4 - 1 calls, each for both branches of guidance.
    assert "teacher evaluations  560 (14 a sample)" in printed
    assert "noise.npy                 1,024 bytes a sample" in printed  # 512 header + 128 + 384 bytes, padded
    assert "device-hours" in printed
    assert not (tmp_path / "root").exists()


def test_a_prepared_table_is_taken_as_it_is(dataset, tmp_path):
    _, root = dataset
    table = tmp_path / "table.parquet"
    table.write_bytes((root / "prompts.parquet").read_bytes())
    generate_pairs(toy_config(tmp_path / "root", tmp_path, prompts={"path": str(table), "column": "ignored"}))
    assert shard_bytes(tmp_path / "root") == shard_bytes(root)
    with pytest.raises(UserError, match=r"prompts.limit: .* is a prompt table and taken as it is"):
        generate_pairs(toy_config(tmp_path / "other", tmp_path, prompts={"path": str(table), "limit": 2}))


def test_a_run_goes_on_when_the_prompt_file_has_gone(tmp_path, dataset):
    config = toy_config(tmp_path / "root", tmp_path)
    generate_pairs(config)
    for path in ("SEALED.json", "commits/000003.json"):
        (tmp_path / "root" / path).unlink()
    (tmp_path / "prompts.txt").unlink()
    generate_pairs(config)
    assert shard_bytes(tmp_path / "root") == shard_bytes(dataset[1])


def test_another_prompt_table_in_the_output_is_replaced_by_the_right_one(tmp_path, dataset):
    config = toy_config(tmp_path / "root", tmp_path)
    generate_pairs(config)
    root = tmp_path / "root"
    right = (root / "prompts.parquet").read_bytes()
    (root / "SEALED.json").unlink()
    (root / "commits/000003.json").unlink()
    (tmp_path / "other.txt").write_text("a\nb\nc\nd\ne\n")
    (root / "prompts.parquet").unlink()
    prepare_prompts(config.prompts.model_copy(update={"path": str(tmp_path / "other.txt")}), root / "prompts.parquet")
    generate_pairs(config)
    assert (root / "prompts.parquet").read_bytes() == right
    assert shard_bytes(root) == shard_bytes(dataset[1])


def test_a_worker_that_sees_another_dataset_refuses(tmp_path, dataset):
    config, root = dataset
    with pytest.raises(UserError, match=r"on host .* this is another dataset; a cluster needs a shared output"):
        PairWorker(str(root), "0" * 64, config.teacher, config.runtime)
    with pytest.raises(UserError, match=r"host .* does not see it"):
        PairWorker(str(tmp_path / "elsewhere"), "0" * 64, config.teacher, config.runtime)


def test_no_temporary_file_is_left(tmp_path, dataset):
    temp = tmp_path / "temp"
    temp.mkdir()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    killed = temp / f"potstill-{process_identity(child.pid)}-000001-5.tar"
    child.communicate(b"\n")
    alive = temp / f"potstill-{process_identity(os.getpid())}-000001-5.tar"
    foreign = temp / "potstill-0123-4567-89-10-000001-5.tar"
    other = temp / "potstill-notes.tar"
    for path in (killed, alive, foreign, other):
        path.write_bytes(b"")
    generate_pairs(toy_config(tmp_path / "root", tmp_path, runtime={"temp_dir": str(temp)}))
    assert sorted(temp.iterdir()) == sorted([alive, foreign, other])


def test_two_prompts_in_one_batch_and_a_prompt_across_batches(tmp_path, dataset):
    # pairs_per_prompt 8 in batches of 5: every combination of cut prompts and mixed batches.
    _, root = dataset
    generate_pairs(toy_config(tmp_path / "root", tmp_path, runtime={"batch_size": 5}, layout={"samples_per_shard": 40}))
    ours = samples(tmp_path / "root")
    assert {key: row["prompt"] for key, (_, row) in ours.items()} == {
        key: row["prompt"] for key, (_, row) in samples(root).items()
    }


def damage_page(table):
    """The footer stays right, and the prompts do not."""
    table.write_bytes(flip(table.read_bytes(), table.stat().st_size // 4))
    assert PromptTable.open(*Storage.of_file(str(table))).num_prompts == 5


@pytest.mark.parametrize("damage", [lambda table: table.write_bytes(b"damaged"), damage_page])
@pytest.mark.parametrize("missing", ["SEALED.json", "commits/000003.json"])
def test_a_damaged_prompt_table_of_an_unfinished_dataset_is_replaced(tmp_path, dataset, damage, missing):
    config = toy_config(tmp_path / "root", tmp_path)
    root = shutil.copytree(dataset[1], tmp_path / "root")
    table = root / "prompts.parquet"
    right = table.read_bytes()
    damage(table)
    (root / "SEALED.json").unlink()
    (root / missing).unlink(missing_ok=True)
    generate_pairs(config)
    assert table.read_bytes() == right
    assert (root / "SEALED.json").exists()
    assert shard_bytes(root) == shard_bytes(dataset[1])


def test_a_damaged_table_that_is_named_is_refused_before_anything_is_written(tmp_path, dataset):
    table = shutil.copy(dataset[1] / "prompts.parquet", tmp_path / "table.parquet")
    damage_page(table)
    with pytest.raises(UserError, match=r"^prompts.path: .*/table.parquet: row group 0 cannot be read"):
        generate_pairs(toy_config(tmp_path / "root", tmp_path, prompts={"path": str(table)}))
    assert not (tmp_path / "root").exists()
