"""JSON that somebody else wrote: what cannot be parsed is a ValueError, however it cannot.

The standard library answers brackets nested too deeply with a RecursionError, which is no ValueError.
"""

import json
from typing import Any


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, not in UTF-8, or nested too deeply. ``json.JSONDecodeError`` where the place is known.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
