"""Hostile variants of a file: its bytes, or the values of a JSON tree, changed at random. The generator decides all."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

TOKENS: list[bytes] = [
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xf0\x9f",
        b"\r",
        b"\n",
        b'"',
        b"{",
        b"[" * 3000,
        b": ",
        b"- ",
        b"&a ",
        b"*a",
    ),
    *(
        b"!!python/name:os.system ",
        b"../../",
        b"/etc/passwd",
        b"9" * 400,
        b"-1",
        b"1e999",
        b"PAR1",
        b"\x93NUMPY",
        b"%s%n",
    ),
    "\u202e".encode(),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**400), 1.5, 1e308, float("inf"), float("nan")),
    *("", " ", "\0", "x" * 5000, "../../../x", "/etc/passwd", "\u202eabc", "\ud800", "none", "builtin", "~", "~root/x"),
    *("s3://", "s3://user:secret@bucket/x", "file:///dev/zero"),
    *([], {}, [[]], {"": None}, [1] * 1000, {"name": "x"}, {"kind": {}}),
]


class Exploit:
    """A pickle that shows that it was loaded, by making a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self._canary,)


def pickled(canary: Path) -> bytes:
    """Bytes that make the file ``canary`` when they are unpickled."""
    return pickle.dumps(Exploit(canary))


def of_bytes(random: Random, data: bytes) -> bytes:
    """One to four changes: a bit, a cut, a slice twice, a token put in, a block of zeros or of noise."""
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(data) + 1)
        size = random.choice([1, 2, 8, 64, 512, 4096])
        match random.randrange(6):
            case 0 if at < len(data):
                data = data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + data[at : at + size] + data[at:]
            case 3:
                data = data[:at] + random.choice(TOKENS) + data[at:]
            case 4:
                data = data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]
            case _:
                data = data[:at] + random.randbytes(size) + data[at + size :]
    return data


def of_tree(random: Random, tree: Any) -> Any:
    """One to three changes of a JSON tree: a value replaced, a key gone, a key more, a value one level deeper."""
    tree = copy.deepcopy(tree)
    for _ in range(random.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return random.choice(VALUES)
        holder, key = random.choice(places)
        match random.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[random.choice(["", "extra", "__class__", "name", "kind", "<<"])] = random.choice(VALUES)
            case 2:
                holder[key] = [holder[key]]
            case _:
                holder[key] = copy.deepcopy(random.choice(VALUES))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)
