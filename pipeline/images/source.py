"""Where real images come from: a source lists them in a fixed order, and reads one.

    entries()   the images in the order of the samples, each with its class and its prompt; nothing else is read yet
    read(i)     the bytes of one image file

:func:`listed` reads every image once and adds what identifies it, the sha256 of its bytes. What cannot be read is in
the list with the reason, and so ends up among the rejected samples. Files that are no images are counted.

Names are shown and stored, never used as paths to write to; one that leads out of its source is refused all the same.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from configs.encode_schema import ImageSource
from configs.errors import UserError
from pipeline.images.source_table import SourceImage
from pipeline.shards.parallel import parallel_map

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MAX_IMAGE_BYTES = 64 << 20
"""A larger image file is listed, and rejected unread: it bounds the memory of whoever reads."""
TOO_LARGE = f"has more than {MAX_IMAGE_BYTES >> 20} MiB"

_PARALLEL_READS = 8
_UNSAFE = re.compile(r"^/|(^|/)\.\.(/|$)|\\|[\x00-\x1f\x7f]")


class UnreadableImage(Exception):
    """The bytes of one image cannot be had, today or tomorrow; the message goes after its name."""


class Source(ABC):
    """Images in a fixed order. Reading is safe in several threads.

    Attributes:
        classes: names of the classes, where the source has names. Complete before the first entry is taken.
        ignored: files that are no images, by suffix. Complete after the last entry.
    """

    def __init__(self) -> None:
        self.classes: tuple[str, ...] = ()
        self.ignored: Counter[str] = Counter()

    @abstractmethod
    def entries(self) -> Iterator[SourceImage]:
        """The images in order, without ``sha256``.

        Raises:
            UserError: the source is not there, or not what it is said to be.
        """

    @abstractmethod
    def read(self, image: SourceImage) -> bytes:
        """The bytes of an image file.

        Raises:
            UnreadableImage: they are damaged.
            FileNotFoundError: the image has gone since it was listed.
            OSError: the storage failed, which says nothing about the image.
        """


def open_source(config: ImageSource) -> Source:
    """The source that a config names. Raises UserError if there is none."""
    from pipeline.images.named_files import FolderFiles, ZipFiles
    from pipeline.images.parquet_rows import ParquetRows
    from pipeline.images.tar_members import TarMembers

    match config.kind:
        case "folder":
            return FolderFiles(config)
        case "zip":
            return ZipFiles(config)
        case "webdataset":
            return TarMembers(config)
        case "parquet":
            return ParquetRows(config)


def listed(source: Source) -> Iterator[SourceImage]:
    """The images of a source in order, with the sha256 of each or the reason why it has none."""
    return parallel_map(lambda image: _identified(source, image), source.entries(), _PARALLEL_READS)


def read_listed(source: Source, image: SourceImage) -> bytes:
    """The bytes of an image that has no fault, which are those that were listed.

    Raises:
        UserError: they have changed since, or gone.
        OSError: the storage failed.
    """
    try:
        data = source.read(image)
    except (FileNotFoundError, UnreadableImage):
        data = b""
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise UserError(
            f"source.path: {image.name} is no longer what it was when the dataset was begun; put it back, or name a "
            "new output"
        )
    return data


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    return suffix_of(name) in IMAGE_SUFFIXES


def suffix_of(name: str) -> str:
    """The last suffix, in lower case, with its dot."""
    return PurePosixPath(name).suffix.lower()


def check_name(name: str, where: str) -> None:
    """Raise UserError for the name of a member that an honest archive does not have."""
    if _UNSAFE.search(name):
        raise UserError(f"{where}: member {name!r} leads out of the archive; write the archive again without it")


def _identified(source: Source, image: SourceImage) -> SourceImage:
    if image.fault:
        return image
    if image.num_bytes > MAX_IMAGE_BYTES:
        return replace(image, fault=TOO_LARGE)
    try:
        return replace(image, sha256=hashlib.sha256(source.read(image)).hexdigest())
    except UnreadableImage as error:
        return replace(image, fault=str(error))
