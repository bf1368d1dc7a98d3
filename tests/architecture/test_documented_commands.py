"""Every command that a page or the header of a configuration gives is one that its script accepts."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import parse

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "docs/log.md"
"""What was run then, by the scripts as they were."""
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")} - {LOG})
HEADERS = sorted((ROOT / "configs").rglob("*.yaml"))
SCRIPT = re.compile(r"(?:python|accelerate launch|torchrun)\b[^`\n]*?\b(stages/\w+|trainer/run)\.py +(.+)")


def commands(path):
    """Scripts and their arguments, as they stand in fenced blocks, in `code` and in the comments of a configuration."""
    text = path.read_text()
    if path.suffix == ".yaml":
        parts = ["\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))]
    else:
        fenced = re.findall(r"```.*?\n(.*?)```", text, re.DOTALL)
        rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        parts = fenced + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    for part in parts:
        for script, words in SCRIPT.findall(re.sub(r"\\\n\s*", "", part)):
            arguments = [word for word in shlex.split(words, comments=True) if word != "&"]
            if arguments != ["..."]:
                yield script, arguments


GIVEN = [(path, *command) for path in (*PAGES, *HEADERS) for command in commands(path)]


def test_there_are_some_of_every_script_but_those_that_make_calls():
    scripts = {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "stages").glob("[a-z]*.py")}
    by_make = {"stages/demo", "stages/demo_pairs"}
    assert {script for _, script, _ in GIVEN} >= scripts - by_make | {"trainer/run"}


def mistakes(model, arguments):
    try:
        parse(model, argv=arguments)
    except UserError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("path", "script", "arguments"), GIVEN, ids=[f"{path.relative_to(ROOT)}-{script}" for path, script, _ in GIVEN]
)
def test_it_is_accepted(monkeypatch, path, script, arguments):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(script.replace("/", "."))
    (model,) = re.findall(r"= parse\((\w+),", Path(module.__file__).read_text())
    told = [re.sub("^my/", "configs/sd15/", word) for word in arguments if word != "..."]
    found = mistakes(getattr(module, model), told)
    assert [line for line in found if "..." not in arguments or ": missing" not in line] == []
