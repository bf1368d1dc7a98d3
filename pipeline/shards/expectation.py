"""What was found, what was expected, and the fault that names both."""

from pipeline.shards.writer import DamagedShard


def expect(shard: int, what: str, found: object, expected: object) -> None:
    """Raise DamagedShard, which names the shard and ``what``, unless ``found`` equals ``expected``."""
    if found != expected:
        raise DamagedShard(f"shard {shard}: {what}: found {_short(found)}, expected {_short(expected)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
