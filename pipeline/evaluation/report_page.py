"""``report.html``: the whole evaluation on one page that needs no other file and asks no server for anything."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from PIL import Image

from pipeline.evaluation import tables
from pipeline.evaluation.results import Report

PAGE = "report.html"
_STYLE = Path(__file__).with_name("page.css")
_SMALL_PIXELS = 104
"""Pictures up to this size are enlarged by whole pixels, others are smoothed."""


def render_page(
    report: Report, *, tiles: Mapping[str, Sequence[bytes | None]], quality: bytes | None, curves: Mapping[str, bytes]
) -> str:
    """The page.

    Args:
        report: what was found.
        tiles: name of a system -> its pictures (PNG), one for each prompt of ``report.grid``.
        quality: the plot of quality against evaluations, as PNG.
        curves: name of a file -> the curves of a training run, as PNG.
    """
    body = [
        f"<h1>{_text(report.title)}</h1>",
        *(f'<p class="lead">{_text(sentence)}</p>' for sentence in tables.summary(report)),
        _systems(report),
        _section("Quality and network evaluations", _plot(quality, "quality against evaluations")) if quality else "",
        _grid(report, tiles),
        _curves(curves),
        _timings(report),
        _section("What the numbers depend on", _about(report.protocol)),
        _section("The student's training run", _about(report.run)) if report.run else "",
        _section("Provenance", _about({**report.provenance, **_origins(report)})),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(report.title)}</title>
<link rel="icon" href="data:,">
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{chr(10).join(filter(None, body))}
</main>
</body>
</html>
"""


def _systems(report: Report) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for title in tables.header(report))
    body = "\n".join(
        f'<tr class="{"student" if system.is_student else "teacher"}">{_cells(row)}</tr>'
        for system, row in zip(report.systems, tables.rows(report), strict=True)
    )
    meanings = "".join(f"<tr>{_cells(pair)}</tr>" for pair in tables.meanings(report))
    return f"""<div class="scroll"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<details><summary>What the columns mean</summary>
<div class="scroll"><table class="about">{meanings}</table></div></details>"""


def _grid(report: Report, tiles: Mapping[str, Sequence[bytes | None]]) -> str:
    if not report.grid:
        return ""
    head = "".join(f"<th>{_text(system.title)}</th>" for system in report.systems)
    lines: list[str] = []
    for row, prompt in enumerate(report.grid.values()):
        pictures = "".join(
            f"<td>{_tile(tiles[system.name][row], f'{system.title}: {prompt}')}</td>" for system in report.systems
        )
        lines.append(f'<tr><td class="prompt">{_text(prompt)}</td>{pictures}</tr>')
    table = f'<div class="scroll"><table class="grid"><tr><th></th>{head}</tr>\n{chr(10).join(lines)}\n</table></div>'
    return _section("The same prompts and noise", table)


def _tile(picture: bytes | None, title: str) -> str:
    if picture is None:
        return '<div class="none">rejected</div>'
    size = max(Image.open(io.BytesIO(picture)).size)
    kind = ' class="large"' if size > _SMALL_PIXELS else ""
    return f'<img{kind} alt="{_text(title)}" title="{_text(title)}" src="{_inline(picture)}">'


def _curves(curves: Mapping[str, bytes]) -> str:
    if not curves:
        return ""
    title = "Curves of the training runs" if len(curves) > 1 else "Curves of the training run"
    captions = {name: PurePath(name).stem for name in curves}
    plots = [
        (f'<p class="note">{_text(captions[name])}</p>\n' if len(curves) > 1 else "") + _plot(picture, captions[name])
        for name, picture in curves.items()
    ]
    return _section(title, "\n".join(plots))


def _timings(report: Report) -> str:
    head, *body = tables.timing_rows(report)
    if not body:
        return ""
    titles = "".join(f"<th>{_text(title)}</th>" for title in head)
    lines = "\n".join(f"<tr>{_cells(row)}</tr>" for row in body)
    table = f'<div class="scroll"><table><tr>{titles}</tr>\n{lines}\n</table></div>'
    return _section("Time", f'<p class="note">{_text(tables.timed_on(report))}</p>\n{table}')


def _origins(report: Report) -> dict[str, str]:
    return {
        system.title: f"{system.sampling}; weights {system.weights_digest[:16]}; "
        f"dataset {system.fingerprint[:16]}, content {system.content_sha256[:16]}"
        for system in report.systems
    }


def _about(values: Mapping[str, object]) -> str:
    rows = "\n".join(f"<tr>{_cells(pair)}</tr>" for pair in tables.about_rows(dict(values)))  # pyright: ignore[reportArgumentType]
    return f'<div class="scroll"><table class="about">\n{rows}\n</table></div>'


def _plot(picture: bytes, title: str) -> str:
    return f'<figure class="plot scroll"><img alt="{_text(title)}" src="{_inline(picture)}"></figure>'


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}"


def _cells(values: Sequence[str]) -> str:
    return "".join(f"<td>{_text(value)}</td>" for value in values)


def _inline(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
