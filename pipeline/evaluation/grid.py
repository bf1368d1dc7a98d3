"""The same few noises and prompts through every system: a column for each.

Pictures are the previews that pair generation keeps (at most 192 pixels), so a grid needs no shard. An evaluation has
copies of them in ``grid/SYSTEM/KEY.png``, which outlive the images.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from pipeline.shard_maker import preview_ids
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import key, preview_path
from pipeline.shards.storage import Storage

GRID = "grid.png"
_TILE_PIXELS = 128
_MARGIN_PIXELS = 8
_TITLE_PIXELS = 24
_PROMPT_PIXELS = 170


def shown_ids(num_images: int, images_per_prompt: int, count: int) -> list[int]:
    """At most ``count`` of the images that have previews, evenly spread, of a prompt each."""
    of_prompts = {i // images_per_prompt: i for i in reversed(preview_ids(num_images))}
    ids = sorted(of_prompts.values())
    count = min(count, len(ids))
    return [ids[(2 * place + 1) * len(ids) // (2 * count)] for place in range(count)]


def tile_path(system: str, sample_key: str) -> str:
    """Where a picture of the grid lies below an evaluation's folder."""
    return f"grid/{system}/{sample_key}.png"


def keep_tiles(storage: Storage, system: str, dataset: Dataset, sample_ids: Sequence[int]) -> None:
    """Copy a system's previews; a sample that was rejected has none, nor is an earlier system's left in its place."""
    for sample_id in sample_ids:
        tile = tile_path(system, key(sample_id))
        if dataset.storage.exists(preview_path(sample_id)):
            storage.write(tile, dataset.storage.read(preview_path(sample_id)))
        else:
            storage.delete(tile)


def read_tiles(storage: Storage, system: str, keys: Sequence[str]) -> list[bytes | None]:
    """A system's pictures as PNG files; None where its sample was rejected."""
    paths = [tile_path(system, sample_key) for sample_key in keys]
    return [storage.read(path) if storage.exists(path) else None for path in paths]


def draw_grid(prompts: Sequence[str], columns: Mapping[str, Sequence[bytes | None]]) -> bytes:
    """A PNG with a row for each prompt.

    Args:
        prompts: B texts.
        columns: title -> B pictures.
    """
    step = _TILE_PIXELS + _MARGIN_PIXELS
    size = (_PROMPT_PIXELS + len(columns) * step + _MARGIN_PIXELS, _TITLE_PIXELS + len(prompts) * step)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=13)
    for row, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, width=24, max_lines=7, placeholder=" ...") or ["(empty prompt)"]
        draw.multiline_text((_MARGIN_PIXELS, _TITLE_PIXELS + row * step), "\n".join(lines), fill="dimgray", font=font)
    for column, (title, tiles) in enumerate(columns.items()):
        left = _PROMPT_PIXELS + column * step
        draw.text((left, 4), title, fill="black", font=font)
        for row, tile in enumerate(tiles):
            if tile is not None:
                grid.paste(_scaled(Image.open(io.BytesIO(tile)).convert("RGB")), (left, _TITLE_PIXELS + row * step))
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _scaled(picture: Image.Image) -> Image.Image:
    """To the size of a tile: by whole pixels where a small picture is enlarged, so that it is shown, not smoothed."""
    longest = max(picture.size)
    if longest > _TILE_PIXELS:
        picture.thumbnail((_TILE_PIXELS, _TILE_PIXELS), Image.Resampling.LANCZOS)
        return picture
    scale = _TILE_PIXELS // longest
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
