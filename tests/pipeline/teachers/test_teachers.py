import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.schema import MixtureTeacherConfig, StableDiffusionTeacherConfig
from pipeline import teachers


def test_check_identity_names_every_field_that_differs() -> None:
    identity = teachers.identify(MixtureTeacherConfig(image_size=8))
    teachers.check_identity(identity, identity.model_copy(), where="/data")
    other = identity.model_copy(update={"dtype": "float16", "schedule": "flow"})
    with pytest.raises(UserError, match=r"/data: dtype is float32, not float16; schedule is edm, not flow;"):
        teachers.check_identity(identity, other, where="/data")


def test_identify_builds_no_network(sd1: Path) -> None:
    """A login node identifies a teacher: neither diffusers nor transformers is loaded, let alone a weight."""
    code = (
        "import sys, json; from pipeline import teachers; from configs.schema import *; "
        "assert 'torch' not in sys.modules; "
        f"identity = teachers.identify(StableDiffusionTeacherConfig(path={str(sd1)!r})); "
        "assert not {'diffusers', 'transformers', 'huggingface_hub'} & sys.modules.keys(); "
        "print(identity.model_dump_json())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    expected = teachers.identify(StableDiffusionTeacherConfig(path=str(sd1)))
    assert json.loads(run.stdout) == expected.model_dump(mode="json")
