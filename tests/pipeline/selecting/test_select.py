"""A selection holds the pairs that meet the expression, says why others went, and leaves the dataset as it is."""

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.rejected import REJECTED, make_with_rejected
from support.toy import files, samples, toy_config

from configs.errors import UserError
from configs.schema import EdmTeacherConfig
from configs.score_schema import ScoreRuntime, SelectPairsConfig
from pipeline import prompts as prompts_module
from pipeline.generate import generate_pairs
from pipeline.prompts import write_rows
from pipeline.scoring.score_shards import score_shards
from pipeline.scoring.score_table import read_column
from pipeline.selecting import select
from pipeline.selecting.select import select_pairs
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import key
from pipeline.shards.reader import PairReader
from pipeline.shards.selection import read_selection
from pipeline.shards.storage import Storage
from tests.support import tiny_edm
from tests.support.scorers import Brightness


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """40 pairs of five prompts in five shards, and what is known of their brightness."""
    folder = tmp_path_factory.mktemp("select")
    generate_pairs(toy_config(folder / "root", folder))
    dataset = Dataset.open(Storage.open(str(folder / "root")))
    score_shards(dataset, "light", Brightness, ScoreRuntime(executor="in-process"))
    return folder / "root"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "some.parquet"


def dataset_of(root):
    return Dataset.open(Storage.open(str(root)))


def chosen(root, output, **config):
    """Keys of the selection that is written."""
    output.unlink(missing_ok=True)
    select_pairs(SelectPairsConfig(root=str(root), output=str(output), **config))
    return [key(i) for i in read_selection(str(output), dataset_of(root).run.fingerprint).sample_ids]


def counts(printed):
    lines = [line.rsplit(maxsplit=1) for line in printed.splitlines() if line.rsplit(maxsplit=1)[-1].isdigit()]
    return {reason: int(count) for reason, count in lines}


def test_conditions_over_index_and_scores(root, output, capsys, monkeypatch):
    mean = dict(zip(sorted(samples(root)), read_column(dataset_of(root), "light", "mean"), strict=True))
    red = [name for name, (_, row) in samples(root).items() if "red" in row["prompt"]]
    middle = float(np.median([mean[name] for name in red]))
    expected = [name for name in red if mean[name] > middle]
    assert 0 < len(expected) < len(red) < 40
    for rows in (1, 9, 1 << 18):
        monkeypatch.setattr(select, "_ROWS", rows)
        assert chosen(root, output, where=f"'red' in prompt and light.mean > {middle!r}") == expected
        assert counts(capsys.readouterr().out) == {
            "pairs stored": 40,
            "not 'red' in prompt": 40 - len(red),
            f"not light.mean > {middle!r}": len(red) - len(expected),
            "remain": len(expected),
        }


def test_one_pair_of_a_prompt(root, output, capsys):
    # Pairs 0, 8, 16, 24, 32 are the first ones of their prompts; the condition takes the first of prompt 1 away.
    found = chosen(root, output, where="key != '000000008'", dedupe_prompts=True)
    assert found == [key(i) for i in (0, 9, 16, 24, 32)]
    assert counts(capsys.readouterr().out)["prompt has one already"] == 39 - 5


def listed_twice(folder):
    prompts = ["a red circle", "a blue square", "a red circle", "a grey dot", "a blue square", "a red circle", "a cup"]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return {"prompts": {"keep_duplicates": True}}


def drawn_classes(folder):
    teacher = EdmTeacherConfig(path=str(tiny_edm.build(folder / "teacher")))
    return {"teacher": teacher, "prompts": {"path": "classes"}}


@pytest.mark.parametrize("source", [listed_twice, drawn_classes])
def test_one_pair_of_a_prompt_that_the_table_repeats(tmp_path, output, capsys, monkeypatch, source):
    monkeypatch.setattr(prompts_module, "_ROW_GROUP", 3)  # so that a prompt comes again in another row group
    spec = {"pairs_per_prompt": 2, "num_samples": 14}
    generate_pairs(toy_config(tmp_path / "root", tmp_path, **source(tmp_path), spec=spec))
    prompt_of = {name: row["prompt"] for name, (_, row) in samples(tmp_path / "root").items()}
    for where in ("key >= '000000000'", "key >= '000000001'", "key not in ['000000002', '000000003', '000000008']"):
        left = chosen(tmp_path / "root", output, where=where)
        first = {prompt_of[name]: name for name in reversed(left)}
        assert len(first) < len({int(name) // 2 for name in left})  # fewer prompts than rows of the table
        capsys.readouterr()
        assert chosen(tmp_path / "root", output, where=where, dedupe_prompts=True) == sorted(first.values())
        assert counts(capsys.readouterr().out)["prompt has one already"] == len(left) - len(first)


def test_prompts_of_another_table_tell_nothing(root, output, tmp_path):
    other = shutil.copytree(root, tmp_path / "root")
    write_rows(other / "prompts.parquet", ["a red circle"] * 5, "another")
    assert len(chosen(other, output)) == 40
    output.unlink()
    with pytest.raises(UserError, match=r"prompts.parquet: not the prompt table of this dataset; put back"):
        select_pairs(SelectPairsConfig(root=str(other), output=str(output), dedupe_prompts=True))
    assert not output.exists()


def test_a_limit_takes_the_first_and_a_seed_takes_any(root, output, capsys):
    assert chosen(root, output, limit=3) == [key(i) for i in range(3)]
    assert counts(capsys.readouterr().out) == {"pairs stored": 40, "over the limit": 37, "remain": 3}
    some = [set(chosen(root, output, limit=limit, sample_seed=1)) for limit in (5, 17, 40, 99)]
    assert [len(found) for found in some] == [5, 17, 40, 40]
    assert some[0] < some[1] < some[2]
    others = [set(chosen(root, output, limit=5, sample_seed=seed)) for seed in range(60)]
    assert others[1] == some[0]
    assert len(set(map(frozenset, others))) == 60
    taken = np.array([sum(name in found for found in others) for name in sorted(some[2])])
    assert taken.min() > 0  # 60 * 5 / 40 = 7.5 on average, each pair alike
    assert taken.max() < 20


def test_an_experiment_with_a_selection_rewrites_no_shard(root, output):
    before = {name: (root / name).stat().st_mtime_ns for name in files(root)}
    content = files(root)
    found = chosen(root, output, where="light.words == 3", limit=20, sample_seed=0)
    reader = PairReader(
        str(root), seed=1, window=2, holdout=2, selection=str(output), cache_folder=os.devnull,
        cache_bytes=10**9, allow_partial=False,
    )  # fmt: skip
    assert reader.num_samples == 18
    assert set(reader.read(range(18)).keys) < set(found)
    assert files(root) == content
    assert {name: (root / name).stat().st_mtime_ns for name in files(root)} == before
    assert output.stat().st_size < 3000  # all that the experiment has written


def test_the_file_says_how_it_was_found(root, output):
    chosen(root, output, where="light.mean > 0", limit=4, sample_seed=2)
    about = json.loads(pq.read_metadata(output).metadata[b"potstill.selection"])
    digest = json.loads((root / "scores/light/scorer.json").read_bytes())["digest"]
    assert about["query"] == f"where light.mean > 0; limit 4; sample_seed 2; scores light {digest[:12]}"


def test_the_same_again_does_nothing_and_another_is_refused(root, output, capsys):
    config = SelectPairsConfig(root=str(root), output=str(output), limit=4)
    select_pairs(config)
    before = output.read_bytes()
    select_pairs(config)
    assert "is there already with the same pairs: nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another selection; remove it or name another output"):
        select_pairs(config.model_copy(update={"limit": 5}))
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"where": "clip > 0.3"}, "where: clip: no such column"),
        ({"where": "light.mean > 1000"}, "no pair of .* is left"),
        ({"where": "light.channels > 0"}, "light.channels: is a vector"),
        ({"output": "some.txt"}, "some.txt: a selection is a .parquet file"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(root, output, config, message):
    with pytest.raises(UserError, match=message) as caught:
        select_pairs(SelectPairsConfig(**{"root": str(root), "output": str(output), **config}))
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_a_dataset_that_is_still_made_and_scores_that_are_missing(root, output, tmp_path, capsys):
    part = shutil.copytree(root, tmp_path / "root")
    for path in ("SEALED.json", "commits/000001.json"):
        (part / path).unlink()
    assert chosen(part, output, where="light.mean > 0") == [key(i) for i in (*range(8), *range(16, 40))]
    assert counts(capsys.readouterr().out)["shards not made yet"] == 1
    next((part / "scores/light").glob("000003-*")).unlink()
    assert len(chosen(part, output, where="seed == 7")) == 32  # needs no scores
    with pytest.raises(UserError, match="1 of 4 shards have no scores, the first is 3"):
        chosen(part, output, where="light.mean > 0")


def test_rejected_samples_are_never_selected(tmp_path, output):
    make_with_rejected(tmp_path / "root", tmp_path)
    dataset = dataset_of(tmp_path / "root")
    score_shards(dataset, "light", Brightness, ScoreRuntime(executor="in-process"))
    stored = [key(i) for i in range(40) if i not in REJECTED]
    for where in ("", "seed == 7", "words > 0", "words > 0 and seed == 7"):
        assert chosen(tmp_path / "root", output, where=where) == stored
    firsts = chosen(tmp_path / "root", output, where="key > '000000000'", dedupe_prompts=True)
    assert firsts == [key(i) for i in (1, 8, 24, 32)]  # all of prompt 2 are rejected


def test_a_seed_without_a_limit_says_nothing():
    with pytest.raises(ValueError, match="sample_seed says which pairs of a limit are kept; give limit too"):
        SelectPairsConfig(root="/r", output="/o.parquet", sample_seed=1)
