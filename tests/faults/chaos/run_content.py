"""What a training run leaves, in a form that is equal for runs that learnt the same."""

import json
from pathlib import Path

from support.toy import files
from support.training import metrics

_TIMED = ("time", "seconds_per_step", "images_per_second", "data_wait_share")
_ABOUT = (".yaml", ".md", "COMPLETE", "trainer_state.json", "run.json", "curves.png")


def content(run_dir: Path) -> dict[str, bytes]:
    """Every file by name with its bytes, without those that depend on the clock or on where the run lies.

    Of texts about the run only the names are kept, of metrics the values, of all else (weights, moments, pictures,
    exports) each byte.
    """
    found = {name: b"" if name.endswith(_ABOUT) else data for name, data in files(run_dir).items()}
    lines = [{key: value for key, value in line.items() if key not in _TIMED} for line in metrics(run_dir)]
    return {**found, "metrics.jsonl": json.dumps(lines).encode()}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Names of files that only one of two runs has, or that differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
