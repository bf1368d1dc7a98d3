"""The two ways a run may end short of success without being a bug, and how to word them.

Contract of every script: exit code 0 done, 2 the user's mistake, 1 anything else. The exceptions here carry
one line that names the key or file and the fix (a config with several mistakes: one line each); :func:`exit_codes`
turns them into those lines and that code.
Every other exception keeps its traceback and exits 1.
"""

import difflib
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager


class UserError(Exception):
    """The user's mistake: a line that names the key or the file, and the fix. Exit code 2."""


class RunStopped(Exception):
    """A run that stopped on purpose with everything committed kept: one line with the cause. Exit code 1."""


@contextmanager
def exit_codes() -> "Generator[None]":
    """Run a script's body; end the process with code 2 on :class:`UserError` and 1 on :class:`RunStopped`.

    Ctrl-C, where nobody handles it, is 130, as shells have it.
    """
    try:
        yield
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped: interrupted", file=sys.stderr)
        sys.exit(130)


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """``, did you mean 'x'?`` with the valid word most like ``word`` in any case; nothing when none is."""
    by_lower = {candidate.lower(): candidate for candidate in valid}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f", did you mean {by_lower[close[0]]!r}?" if close else ""
