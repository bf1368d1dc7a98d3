"""A disk that fills up under a run is no bug: it ends in one line."""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import RunStopped

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disk_stops(run_dir: Path) -> Generator[None]:
    """Turn the error of a full disk, under metrics, pictures, exports or the page of a run, into RunStopped."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise RunStopped(
            f"{run_dir}: no space left ({error}); its checkpoints are untouched: make room and run the same command "
            "again"
        ) from error
