"""What the tests of this folder share: a Ray head for the session, on free ports; prompt tables of a few texts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.prompt_tables import rows_of, save

from configs.schema import PromptsConfig
from pipeline import prompts as prompts_module
from pipeline.prompts import PromptReport, prepare_prompts
from pipeline.ray_head import ray_head


@pytest.fixture(scope="session")
def head():
    with ray_head(num_cpus=2, num_gpus=0) as running:
        yield running


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in a worker: networks this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., tuple[PromptReport, list[tuple[str, str]]]]:
    """Make a table of texts; returns the report and the table's rows."""

    def run(texts: list[str | None], suffix: str = "jsonl", **options: object) -> tuple[PromptReport, list]:
        output = tmp_path / "table.parquet"
        output.unlink(missing_ok=True)
        report = prepare_prompts(PromptsConfig(path=save(tmp_path / f"in.{suffix}", texts), **options), output)
        return report, rows_of(output)

    return run


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut chunks and row groups so small that a few prompts cross many edges."""
    monkeypatch.setattr(prompts_module, "_CHUNK", 4)
    monkeypatch.setattr(prompts_module, "_ROW_GROUP", 3)
