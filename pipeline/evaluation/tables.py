"""The table of systems and the sentences above it, as text: what ``report.md`` and ``report.html`` both say."""

from collections.abc import Sequence
from decimal import Decimal

from pydantic import JsonValue

from pipeline.evaluation.results import KID_GIVEN, Report, SystemResult, columns, metric, reference_teacher


def header(report: Report) -> list[str]:
    """Titles of the table's columns, with an arrow to the better end."""
    arrows = {"lower": "\N{NO-BREAK SPACE}↓", "higher": "\N{NO-BREAK SPACE}↑", "": ""}
    numbers = [metric(name) for name in columns(report.systems)]
    timed = ["images/s", "faster"] if _timed(report.systems) else []
    return ["system", "evaluations", *timed, *(about.title + arrows[about.better] for about in numbers), "images"]


def rows(report: Report) -> list[list[str]]:
    """A row for each system, as long as :func:`header`; what was not measured is empty."""
    teacher = reference_teacher(report.systems)
    return [_row(report, system, teacher) for system in report.systems]


def _row(report: Report, system: SystemResult, teacher: SystemResult | None) -> list[str]:
    cells = [system.title, f"{system.evaluations:,}"]
    if _timed(report.systems):
        fastest, ratio = system.fastest, speed_up(system, teacher)
        cells += [
            "" if fastest is None else number(fastest.images_per_second, 3),
            "" if ratio is None else f"{number(ratio, 3)} x",
        ]
    for name in columns(report.systems):
        value = system.numbers.get(name)
        cells.append("" if value is None else number(value, metric(name).digits))
    rejected = f" ({system.num_rejected:,} rejected)" if system.num_rejected else ""
    return [*cells, f"{system.num_images:,}{rejected}"]


def meanings(report: Report) -> list[tuple[str, str]]:
    """(title, meaning) of each number in the table, and of KID where it is missing, why."""
    found = [("evaluations", "network evaluations of one image, guidance included")]
    if _timed(report.systems):
        found.append(("images/s", "from prompts to pictures, at the batch size that gives most, median"))
        found.append(
            ("faster", "its images/s over those that the same device has of the teacher with most evaluations")
        )
    found += [(metric(name).title, metric(name).meaning) for name in columns(report.systems)]
    reference = report.protocol.get("reference")
    if isinstance(reference, dict) and reference.get("kid") != KID_GIVEN:
        found.append((metric("kernel_distance").title, str(reference.get("kid"))))
    return found


def summary(report: Report) -> list[str]:
    """A sentence for each student: its quality, and what it saves."""
    teacher = reference_teacher(report.systems)
    return [_sentence(system, teacher) for system in report.systems if system.is_student]


def _sentence(student: SystemResult, teacher: SystemResult | None) -> str:
    names = [name for name in ("frechet_distance", "clip_score", "accuracy") if name in student.numbers]
    found = ", ".join(f"{metric(name).title} {number(student.numbers[name], metric(name).digits)}" for name in names)
    sentence = f"{student.title}: {found or 'no number but times'} in {_calls(student.evaluations)} an image"
    if teacher is None:
        return f"{sentence}."
    theirs = ", ".join(
        number(teacher.numbers[name], metric(name).digits) if name in teacher.numbers else "not measured"
        for name in names
    )
    ratio = speed_up(student, teacher)
    faster = "" if ratio is None else f" and {number(ratio, 3)} times as many images a second"
    return (
        f"{sentence}; {teacher.title}: {theirs or 'likewise'} in {_calls(teacher.evaluations)}. "
        f"That is 1/{teacher.evaluations / student.evaluations:,.0f} of the evaluations{faster}."
    )


def speed_up(system: SystemResult, teacher: SystemResult | None) -> float | None:
    """How many times as many images a second as the teacher; None unless one device has timed both."""
    ours, theirs = system.fastest, teacher.fastest if teacher is not None else None
    if ours is None or theirs is None or ours.device != theirs.device:
        return None
    return ours.images_per_second / theirs.images_per_second


def timing_rows(report: Report) -> list[list[str]]:
    """Milliseconds of a batch, whole and in parts, for each system and batch size; titles first."""
    found = [["system", "batch", "whole, ms", "quartiles", "text encoder", "network", "decoder", "images/s"]]
    for system in report.systems:
        for timing in system.timings:
            low, median, high = (number(1000 * seconds, 3) for seconds in timing.total)
            parts = [number(1000 * seconds, 3) for seconds in (timing.text_encoder, timing.network, timing.decoder)]
            speed = number(timing.images_per_second, 3)
            found.append([system.title, str(timing.batch_size), median, f"{low} to {high}", *parts, speed])
    return found


def timed_on(report: Report) -> str:
    """What times were measured on."""
    devices = sorted({timing.device for system in report.systems for timing in system.timings})
    return f"Measured on {', '.join(devices)}, one batch at a time."


def about_rows(values: dict[str, JsonValue], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted key, text)."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += about_rows(value, f"{prefix}{name}.")
        elif value is not None and value != "":
            found.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found


def number(value: float, digits: int) -> str:
    """So many significant digits, zeros at the end included, and never an exponent."""
    return f"{Decimal(f'{value:#.{digits}g}'):,f}"


def _timed(systems: Sequence[SystemResult]) -> bool:
    return any(system.timings for system in systems)


def _calls(count: int) -> str:
    return f"{count:,} evaluation{'s' * (count > 1)}"
