"""A disk that fills up under a run is no bug: it ends in one line."""

import errno
from collections.abc import Generator
from contextlib import contextmanager

from configs.errors import RunStopped

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the system's errors."""


@contextmanager
def full_disk_stops(root: str, kept: str) -> Generator[None]:
    """Turn the error of a full disk, whichever file of ``root`` it met, into RunStopped; ``kept`` says what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise RunStopped(
            f"{root}: no space left ({error}); {kept}: make room and run the same command again"
        ) from error
