"""Images with names: below a folder, or in a zip archive. The order is that of the names, folder by folder."""

import lzma
import threading
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from configs.encode_schema import FolderSource, NamedFilesSource, ZipSource
from configs.errors import UserError
from configs.json_text import parse_json
from pipeline.images.captions import read_captions
from pipeline.images.source import Source, UnreadableImage, check_name, is_image, suffix_of
from pipeline.images.source_table import SourceImage
from pipeline.shards.storage import Storage

DATASET_JSON = "dataset.json"
_MAX_JSON_BYTES = 1 << 30


class NamedFiles(Source):
    """What a folder and an archive have in common.

    Args:
        config: where they lie, and where classes and prompts come from.
    """

    def __init__(self, config: NamedFilesSource) -> None:
        super().__init__()
        self._config = config

    @abstractmethod
    def _sizes(self) -> dict[str, int]:
        """Name -> bytes of every file, images or not."""

    @abstractmethod
    def _read(self, name: str) -> bytes:
        """A whole file. Raises UnreadableImage, FileNotFoundError, OSError."""

    def entries(self) -> Iterator[SourceImage]:
        """The images, each with its class and its prompt."""
        sizes = self._sizes()
        names = sorted((name for name in sizes if is_image(name)), key=lambda name: name.split("/"))
        if not names:
            raise UserError(f"source.path: {self._config.path} holds no image (png, jpg, jpeg, webp, bmp)")
        labels = self._labels(names, sizes)
        prompts = read_captions(self._config, names) if self._config.captions else None
        used = {DATASET_JSON} if self._config.labels == DATASET_JSON else set()
        self.ignored.update(suffix_of(name) or name for name in sizes.keys() - set(names) - used)
        for name in names:
            label = labels.get(name, -1)
            class_name = self.classes[label] if self.classes and label >= 0 else ""
            yield SourceImage(name, sizes[name], label=label, prompt=prompts[name] if prompts else class_name)

    def read(self, image: SourceImage) -> bytes:
        """The bytes of an image file."""
        return self._read(image.name)

    def _labels(self, names: list[str], sizes: dict[str, int]) -> dict[str, int]:
        """Name -> class; sets the names of the classes if they have any."""
        if self._config.labels == "none":
            return {}
        if self._config.labels == DATASET_JSON:
            return self._labels_of_dataset_json(names, sizes)
        flat = [name for name in names if "/" not in name]
        if flat:
            raise UserError(f"source.labels: folders, and {flat[0]} of {self._config.path} lies in none; move it")
        self.classes = tuple(sorted({name.split("/")[0] for name in names}))
        numbers = {folder: number for number, folder in enumerate(self.classes)}
        return {name: numbers[name.split("/")[0]] for name in names}

    def _labels_of_dataset_json(self, names: list[str], sizes: dict[str, int]) -> dict[str, int]:
        where = f"source.labels: {DATASET_JSON} of {self._config.path}"
        if sizes.get(DATASET_JSON, _MAX_JSON_BYTES + 1) > _MAX_JSON_BYTES:
            raise UserError(f"{where} is not there, or too large; choose other labels")
        try:
            pairs: list[tuple[str, Any]] = parse_json(self._read(DATASET_JSON))["labels"]
            labels = {name: label for name, label in pairs}
        except (ValueError, KeyError, TypeError, UnreadableImage):
            raise UserError(f'{where} does not hold {{"labels": [[name, class], ...]}}; choose other labels') from None
        for name in names:
            if type(labels.get(name)) is not int or labels[name] < 0:
                raise UserError(f"{where} gives {name} no class from 0; choose other labels")
        return labels


class FolderFiles(NamedFiles):
    """The images below a folder or a prefix."""

    def __init__(self, config: FolderSource) -> None:
        super().__init__(config)
        self._storage = Storage.open(config.path)

    def _sizes(self) -> dict[str, int]:
        return {info.path: info.size for info in self._storage.list()}

    def _read(self, name: str) -> bytes:
        return self._storage.read(name)


class ZipFiles(NamedFiles):
    """The images of a zip archive, read where they lie; nothing is unpacked."""

    def __init__(self, config: ZipSource) -> None:
        super().__init__(config)
        storage, name = Storage.of_file(config.path)
        try:
            self._zip = zipfile.ZipFile(storage.reader(name))
        except FileNotFoundError:
            raise UserError(f"source.path: there is no {config.path}") from None
        except zipfile.BadZipFile as error:
            raise UserError(f"source.path: {config.path} is no zip archive, or a damaged one ({error})") from None
        self._lock = threading.Lock()

    def entries(self) -> Iterator[SourceImage]:
        """The images; those that are encrypted have that fault."""
        for image in super().entries():
            encrypted = self._zip.getinfo(image.name).flag_bits & 1
            yield replace(image, fault="is encrypted") if encrypted else image

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for info in self._zip.infolist():
            check_name(info.filename, self._config.path)
            if info.filename in sizes:
                raise UserError(f"source.path: {self._config.path} has {info.filename} twice; write it again")
            if not info.is_dir():
                sizes[info.filename] = info.file_size
        return sizes

    def _read(self, name: str) -> bytes:
        # A member never gives more bytes than its entry states, whatever is packed in it.
        try:
            with self._lock:
                return self._zip.read(name)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError):
            raise UnreadableImage("cannot be unpacked") from None
