"""Some pictures of a dataset, evenly spread over it, each over its prompt."""

import io
import textwrap
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

from pipeline.shard_maker import preview_ids
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import key, preview_path
from pipeline.shards.members import decode_image

_COLUMNS = 6
_CELL_PIXELS = 192
_CAPTION_PIXELS = 34
_MARGIN_PIXELS = 8


def contact_sheet(dataset: Dataset, prompt_of: Callable[[int], str]) -> bytes:
    """A PNG of the preview pictures; where there is none its cell says why.

    Args:
        dataset: every one of its shards exists.
        prompt_of: sample id -> its prompt.
    """
    ids = preview_ids(dataset.run.spec.num_samples)
    columns = min(_COLUMNS, len(ids))
    cell = (_CELL_PIXELS + _MARGIN_PIXELS, _CELL_PIXELS + _CAPTION_PIXELS + _MARGIN_PIXELS)
    rows = -(-len(ids) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN_PIXELS, rows * cell[1] + _MARGIN_PIXELS), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for at, sample_id in enumerate(ids):
        left = _MARGIN_PIXELS + at % columns * cell[0]
        top = _MARGIN_PIXELS + at // columns * cell[1]
        prompt = prompt_of(sample_id)
        lines = textwrap.wrap(prompt, width=30, max_lines=2, placeholder=" ...") or ["(empty prompt)"]
        draw.multiline_text((left, top + _CELL_PIXELS + 2), "\n".join(lines), fill="black", font=font, spacing=2)
        try:
            picture = Image.fromarray(decode_image(dataset.storage.read(preview_path(sample_id))))
        except (FileNotFoundError, ValueError):
            draw.rectangle((left, top, left + _CELL_PIXELS, top + _CELL_PIXELS), outline="silver")
            draw.text((left + 8, top + 8), why_no_preview(dataset, sample_id), fill="gray", font=font)
            continue
        scale = max(1, _CELL_PIXELS // max(picture.size))  # small pictures whole pixels larger, never blurred
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (left + (_CELL_PIXELS - picture.width) // 2, top + (_CELL_PIXELS - picture.height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def why_no_preview(dataset: Dataset, sample_id: int) -> str:
    """What the contact sheet says in place of a picture: its sample was rejected, or just the picture is not there."""
    commit = dataset.commit(sample_id // dataset.run.layout.samples_per_shard)
    reasons = {entry.key: entry.reason for entry in commit.rejected} if commit is not None else {}
    reason = reasons.get(key(sample_id))
    return "no preview" if reason is None else f"rejected:\n{reason}"
