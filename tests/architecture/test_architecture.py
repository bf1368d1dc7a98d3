"""What a reader may rely on about the tree as a whole."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "pipeline", "stages", "trainer")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = ("ray", "accelerate", "torchvision", "transformers", "diffusers", "cleanfid", "open_clip", "lpips")


def test_the_import_contracts_hold():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "Contracts: 7 kept, 0 broken." in done.stdout


@pytest.mark.parametrize("package", ["stages", "trainer"])
def test_no_script_shadows_a_module(package):
    # A script's folder comes first on the import path: a file named like a library would hide it from everyone.
    libraries = set(sys.stdlib_module_names) | set(metadata.packages_distributions())
    names = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert names.isdisjoint(libraries - set(PACKAGES))


def test_importing_the_pipeline_brings_no_heavy_library():
    code = (
        "import configs, configs.load, configs.schema, pipeline, pipeline.shards.layout, sys;"
        f"print([name for name in {(*HEAVY, 'torch', 'pyarrow')!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_generating_in_process_needs_no_ray():
    code = f"import pipeline.generate, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_concept_and_says_which(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(source))


SCRIPTS = sorted([*(ROOT / "stages").glob("[a-z]*.py"), ROOT / "trainer" / "run.py"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_thin_and_helps_from_any_folder(path, tmp_path):
    assert len(path.read_text().splitlines()) < 80
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout
