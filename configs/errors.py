"""The two ways a run may end short of success without being a bug.

Contract of every script: exit code 0 done, 2 the user's mistake, 1 anything else. The exceptions here carry exactly
one line that names the key or file and the fix; :func:`exit_codes` turns them into that line and that code.
Every other exception keeps its traceback and exits 1.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """The user's mistake: one line that names the key or the file, and the fix. Exit code 2."""


class RunStopped(Exception):
    """A run that stopped on purpose with everything committed kept: one line with the cause. Exit code 1."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Run a script's body; end the process with code 2 on :class:`UserError` and 1 on :class:`RunStopped`."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
