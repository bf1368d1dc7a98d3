"""Commands of other packages, which lie beside this interpreter: PATH may hold another environment's, or none."""

import sys
from pathlib import Path

from configs.errors import UserError


def installed_command(name: str, extra: str) -> str:
    """Path of a command.

    Args:
        name: of the command.
        extra: the one of this package that brings it.

    Raises:
        UserError: it is not there.
    """
    path = Path(sys.executable).with_name(name)
    if not path.is_file():
        raise UserError(f"{name} is not installed: there is no {path}; pip install 'potstill[{extra}]'")
    return str(path)
