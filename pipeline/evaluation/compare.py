"""Several evaluations side by side, on the page of one.

Their numbers compare when their protocols are the same. A system that occurs in several of them (a teacher, mostly) is
one row: the same bytes drawn with the same weights are the same system.
"""

from collections.abc import Sequence
from pathlib import PurePath

from configs.errors import UserError
from configs.evaluate_schema import CompareConfig
from configs.fingerprint import differences
from pipeline.evaluation.grid import read_tiles
from pipeline.evaluation.report import CURVES, write_files
from pipeline.evaluation.results import Report, SystemResult, read_report
from pipeline.shards.storage import Storage


def compare(config: CompareConfig) -> None:
    """Write the page of several evaluations to ``config.output``.

    Raises:
        UserError: one of them has no report, two have one name, or their numbers do not compare.
    """
    storages = [Storage.open(folder) for folder in config.evaluations]
    names = [PurePath(storage.uri).name for storage in storages]
    if len(set(names)) < len(names):
        raise UserError(f"two evaluations are called {max(names, key=names.count)}; they are told apart by that name")
    reports = [read_report(storage) for storage in storages]
    for name, report in zip(names, reports, strict=True):
        _check_protocol(names[0], reports[0], name, report)
    grid = {key: prompt for key, prompt in reports[0].grid.items() if all(key in report.grid for report in reports)}
    systems: list[SystemResult] = []
    tiles: dict[str, list[bytes | None]] = {}
    for name, storage, report in zip(names, storages, reports, strict=True):
        for system in report.systems:
            if any(_is_same(system, other) for other in systems):
                continue
            renamed = _renamed(system, name, systems)
            systems.append(renamed)
            tiles[renamed.name] = read_tiles(storage, system.name, list(grid))
    systems.sort(key=lambda system: system.is_student)  # teachers first, else as they came
    merged = Report(
        title=f"{', '.join(names)}: side by side",
        protocol=reports[0].protocol,
        systems=tuple(systems),
        grid=grid,
        run={name: report.run for name, report in zip(names, reports, strict=True) if report.run},
        provenance={name: report.provenance for name, report in zip(names, reports, strict=True)},
    )
    output = Storage.open(config.output)
    curves = {
        f"{PurePath(CURVES).stem}-{name}.png": storage.read(CURVES)
        for name, storage in zip(names, storages, strict=True)
        if storage.exists(CURVES)
    }
    write_files(output, merged, tiles, curves)
    print(f"open {output.uri}/report.html")


def _check_protocol(first: str, report: Report, name: str, other: Report) -> None:
    if differing := differences(report.protocol, other.protocol):
        listed = "; ".join(f"{key} is {a!r} in {first}, {b!r} in {name}" for key, a, b in differing)
        raise UserError(f"{name}: its numbers do not compare with those of {first} ({listed}); evaluate them alike")


def _is_same(a: SystemResult, b: SystemResult) -> bool:
    return (a.fingerprint, a.content_sha256) == (b.fingerprint, b.content_sha256)


def _renamed(system: SystemResult, evaluation: str, others: Sequence[SystemResult]) -> SystemResult:
    """A student is called after its evaluation, and so is a teacher that another one has come before."""
    if not system.is_student and system.name not in {other.name for other in others}:
        return system
    return system.model_copy(
        update={
            "name": f"{evaluation}-{system.name}",
            "title": evaluation if system.is_student else f"{evaluation}: {system.title}",
            "family": f"{evaluation}: {system.family}",
        }
    )
