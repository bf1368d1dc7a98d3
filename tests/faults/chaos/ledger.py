"""What the faults cost: a line of JSON for every schedule, and a page with their sums."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean


@dataclass
class Entry:
    """What became of one schedule.

    Attributes:
        kind: pairs or training.
        seed: of the schedule.
        injected: what was killed, or otherwise done, in order; one that came too late is not there.
        commands: how often the command was run until it had nothing left to do.
        lost_s: seconds of work that was under way in what died, at most; one device for each actor or process.
        recover_s: for each fault, seconds until what it had undone, or stopped, was done; or None when nothing was.
        seconds: from the first command to the end of the last.
    """

    kind: str
    seed: int
    injected: list[str] = field(default_factory=list)
    commands: int = 0
    lost_s: float = 0.0
    recover_s: list[float | None] = field(default_factory=list)
    seconds: float = 0.0


class Ledger:
    """The schedules of one session.

    Args:
        folder: where ``schedules.jsonl`` and ``report.md`` go; None: nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._entries: list[Entry] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "schedules.jsonl").unlink(missing_ok=True)

    def add(self, entry: Entry) -> None:
        """Add a schedule that has been survived."""
        self._entries.append(entry)
        if self._folder is not None:
            with (self._folder / "schedules.jsonl").open("a") as file:
                file.write(json.dumps(asdict(entry)) + "\n")

    def close(self) -> str:
        """The page, which is also written."""
        kinds = sorted({entry.kind for entry in self._entries})
        page = "\n\n".join(_table(kind, [entry for entry in self._entries if entry.kind == kind]) for kind in kinds)
        if self._folder is not None:
            (self._folder / "report.md").write_text(f"# Faults\n\n{page}\n")
        return page


def _table(kind: str, entries: list[Entry]) -> str:
    faults = Counter(fault for entry in entries for fault in entry.injected)
    recover = [seconds for entry in entries for seconds in entry.recover_s if seconds is not None]
    rows = {
        "schedules": len(entries),
        "faults injected": f"{faults.total()} ({', '.join(f'{name} {count}' for name, count in faults.most_common())})",
        "commands": sum(entry.commands for entry in entries),
        "device-seconds lost, at most": f"{sum(entry.lost_s for entry in entries):.1f}",
        "seconds to recover, mean and longest": f"{mean(recover):.1f}, {max(recover):.1f}" if recover else "none",
        "seconds in all": f"{sum(entry.seconds for entry in entries):.0f}",
    }
    return "\n".join([f"| {kind} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
