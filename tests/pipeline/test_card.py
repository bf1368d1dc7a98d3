"""The data card says what is so, and its snippet runs."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from support.forge import record
from support.patience import PATIENCE_S
from support.toy import toy_config

from pipeline import contact_sheet
from pipeline.card import card
from pipeline.generate import generate_pairs
from pipeline.shards.dataset import Dataset
from pipeline.shards.storage import Storage
from pipeline.teachers.mixture import MixtureTeacher


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """40 pairs of which sample 13 was rejected."""
    folder = tmp_path_factory.mktemp("card")
    original = MixtureTeacher.sample

    def sample(self, noise, *args, sample_ids, **kwargs):
        x0 = original(self, noise, *args, sample_ids=sample_ids, **kwargs)
        x0[[i == 13 for i in sample_ids]] = float("nan")
        return x0

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MixtureTeacher, "sample", sample)
        generate_pairs(toy_config(folder / "root", folder, runtime={"max_rejected_fraction": 0.1}))
    return folder / "root"


def test_the_snippet_reads_every_sample_once(root):
    # A worker that lost a race has left its tar of the same shard: a listing would read those samples twice.
    (root / "shards/00000000-000001-000000000000.tar").write_bytes((root / record(root, 1)["path"]).read_bytes())
    text = (root / "README.md").read_text()
    snippet = text.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=root, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    members = "['__key__', '__local_path__', '__url__', 'json', 'noise.npy', 'png', 'txt', 'x0.npy']"
    assert done.stdout.splitlines() == [f"{i:09d} {members}" for i in range(40) if i != 13]


def test_an_empty_cell_says_why_it_is_empty(root, monkeypatch):
    dataset = Dataset.open(Storage.open(str(root)))
    assert contact_sheet.why_no_preview(dataset, 13) == "rejected:\nx0 is not finite"
    assert contact_sheet.why_no_preview(dataset, 12) == "no preview"
    monkeypatch.setattr(contact_sheet, "preview_ids", lambda _: [12, 13, 14])
    said = []
    monkeypatch.setattr(contact_sheet, "why_no_preview", lambda _, sample_id: said.append(sample_id) or "")
    for sample_id in (12, 14):
        Image.new("RGB", (8, 8)).save(root / f"previews/{sample_id:09d}.png")
    contact_sheet.contact_sheet(dataset, str)
    assert said == [13]
    (root / "previews/000000012.png").unlink()
    (root / "previews/000000014.png").write_bytes(b"no picture")
    contact_sheet.contact_sheet(dataset, str)
    assert said == [13, 12, 13, 14]


def test_a_negative_prompt_stays_in_its_cell(root):
    dataset = Dataset.open(Storage.open(str(root)))
    sealed, spec = json.loads((root / "SEALED.json").read_bytes()), dataset.run.spec
    run = dataset.run.model_copy(update={"spec": spec.model_copy(update={"negative_prompt": "blurry | text"})})
    lines = card(SimpleNamespace(run=run), sealed).splitlines()
    (line,) = (line for line in lines if line.startswith("| guidance_scale |"))
    assert line.endswith(r", negative prompt 'blurry \| text' |")
