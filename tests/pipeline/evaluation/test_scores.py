"""Tables are named after what a network is: where it lies does not matter, its weights do."""

import shutil

import pytest
from support import evaluation, tiny_clip

from configs.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.scores import Scores


def names(world, judge):
    features = {"kind": "open_clip_features", "model": f"local-dir:{judge}"}
    found = Scores(evaluation.config(world, world / "out", features=features))
    return found.features, found.clip


def test_a_copy_has_the_names_of_the_original_and_other_weights_in_its_place_have_others(world, tmp_path):
    copy = shutil.copytree(world / "judge", tmp_path / "judge")
    first = names(world, world / "judge")
    assert len(set(first)) == 2
    assert names(world, copy) == first
    tiny_clip.build(copy, seed=1)
    changed = names(world, copy)
    assert (changed[0] != first[0], changed[1]) == (True, first[1])


def test_missing_weights_are_found_missing_before_anything_is_written(world, tmp_path):
    for executor in ("in-process", "ray"):
        changes = {"runtime": {"executor": executor}, "clip": {"model": "local-dir:/nowhere"}}
        with pytest.raises(UserError, match=r"has no open_clip_config\.json"):
            evaluate(evaluation.config(world, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
