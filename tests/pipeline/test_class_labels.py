"""Labels in the place of prompts: drawn uniformly, or listed, one for each sample."""

from collections import Counter
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.schema import PromptsConfig
from pipeline.class_labels import CLASSES, draw_labels, write_labels
from pipeline.prompts import PromptTable, prepare_prompts
from pipeline.shards.storage import Storage


def rows(path: Path) -> list[str]:
    table = PromptTable.open(*Storage.of_file(str(path)))
    table.verify()
    return table.rows(0, table.num_prompts)[1]


def test_the_draws_are_those_of_the_recipe() -> None:
    # BLAKE2b-64 of "7/0/class", "7/1/class", ...: what another implementation must come to.
    assert list(draw_labels(1000, 7, 6)) == ["694", "46", "432", "782", "527", "631"]


def test_labels_are_uniform_and_a_longer_list_begins_as_a_shorter_one() -> None:
    drawn = list(draw_labels(10, 0, 20_000))
    assert drawn[:100] == list(draw_labels(10, 0, 100)) != list(draw_labels(10, 1, 100))
    counts = Counter(drawn)
    assert set(counts) == {str(label) for label in range(10)}
    chi_squared = sum((count - 2000) ** 2 / 2000 for count in counts.values())
    assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001


def test_a_table_has_a_label_for_each_sample_or_group_of_samples(tmp_path: Path) -> None:
    table = tmp_path / "table.parquet"
    info = write_labels(table, PromptsConfig(path=CLASSES), 10, 3, 100_003, 1)
    assert rows(table) == list(draw_labels(10, 3, 100_003))
    assert (info.count, info.read, sum(info.dropped.values())) == (100_003, 100_003, 0)
    write_labels(table, PromptsConfig(path=CLASSES), 10, 3, 10, 4)
    assert rows(table) == list(draw_labels(10, 3, 3))


def test_the_label_of_a_teacher_without_classes_is_empty(tmp_path: Path) -> None:
    write_labels(tmp_path / "table.parquet", PromptsConfig(path=CLASSES), 0, 3, 5, 1)
    assert rows(tmp_path / "table.parquet") == [""] * 5


@pytest.mark.parametrize(
    ("options", "num_samples", "message"),
    [({"limit": 5}, 5, "prompts.limit: nothing is filtered"), ({}, None, "say how many samples to make")],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, options: dict[str, int], num_samples: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write_labels(tmp_path / "table.parquet", PromptsConfig(path=CLASSES, **options), 10, 0, num_samples, 1)
    assert not (tmp_path / "table.parquet").exists()


def test_listed_labels_are_kept_in_order_with_repetitions_if_asked(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("3\n1\n3\n\n3\n")
    config = PromptsConfig(path=str(tmp_path / "labels.txt"))
    report = prepare_prompts(config.model_copy(update={"keep_duplicates": True}), tmp_path / "kept.parquet")
    assert rows(tmp_path / "kept.parquet") == ["3", "1", "3", "3"]
    assert report.info.dropped["empty"] == 1
    prepare_prompts(config, tmp_path / "once.parquet")
    assert rows(tmp_path / "once.parquet") == ["3", "1"]
