"""Errors of the system, such as a full disk, out of safetensors, which has one kind of its own for everything."""

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def system_errors(path: Path) -> Generator[None]:
    """Raise OSError where safetensors could not write the file ``path`` in the body, and the system said why."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        system = re.search(r"\(os error (\d+)\)", str(error))
        if system is None:
            raise
        raise OSError(int(system[1]), os.strerror(int(system[1])), str(path)) from error
