"""Real images for tests: the same pictures as a folder, an archive, tars and a table; and a config to encode them."""

import csv
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from support.pictures import pictures

from configs.encode_schema import EncodeImagesConfig

CLASSES = ["cat", "dog"]
NUM_IMAGES = 11


def image_files(count: int = NUM_IMAGES) -> dict[str, bytes]:
    """Name -> PNG, 24 x 20 pixels, in the order in which a dataset has them; the class is the first folder."""
    encoded: dict[str, bytes] = {}
    for at, picture in enumerate(pictures(count)):
        name = f"{CLASSES[2 * at // count]}/{at:03d}.png"
        encoded[name] = png(picture)
    return encoded


def png(picture: np.ndarray) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """Files below a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    """An archive, its members in the opposite order."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in reversed(files.items()):
            archive.writestr(name, data)
    return path


def write_tars(folder: Path, files: dict[str, bytes], per_tar: int = 4) -> Path:
    """WebDataset tars with a class and a prompt for each image."""
    folder.mkdir()
    items = list(files.items())
    for start in range(0, len(items), per_tar):
        with tarfile.open(folder / f"{start:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in items[start : start + per_tar]:
                stem, label = name.removesuffix(".png").replace("/", "-"), CLASSES.index(name.split("/")[0])
                members = {
                    f"{stem}.cls": str(label).encode(),
                    f"{stem}.png": data,
                    f"{stem}.txt": caption(name).encode(),
                }
                for member, content in members.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def write_parquet(path: Path, files: dict[str, bytes], *, row_group: int = 3, struct: bool = True) -> Path:
    """A table as Hugging Face datasets have them."""
    images = [{"bytes": data, "path": name} for name, data in files.items()]
    columns = {
        "image": images if struct else list(files.values()),
        "label": [CLASSES.index(name.split("/")[0]) for name in files],
        "caption": [caption(name) for name in files],
    }
    pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


def write_captions(path: Path, files: dict[str, bytes]) -> Path:
    """A table of prompts by name."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *((name, caption(name)) for name in files)])
    return path


def caption(name: str) -> str:
    """A prompt for an image."""
    return f"the picture {Path(name).stem} of a {name.split('/')[0]}"


def encode_config(output: Path | str, source: dict[str, Any], **sections: Any) -> EncodeImagesConfig:
    """Images of 16 pixels in shards of four, made in this process; ``sections`` override entries."""
    config: dict[str, Any] = {
        "output": str(output),
        "source": source,
        "spec": {"image_size": 16},
        "layout": {"samples_per_shard": 4},
        "runtime": {"executor": "in-process", "batch_size": 3, "lease_period_s": 0.2},
    }
    for section, entries in sections.items():
        config[section] = {**config.get(section, {}), **entries}
    return EncodeImagesConfig.model_validate(config)
