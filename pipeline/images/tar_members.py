"""The images of WebDataset tars, read where they lie. The order is that of the tars' names, then that of the members.

The members of a sample share the name up to its first dot and follow each other: one image, perhaps a class (``cls``,
digits) and a prompt (``txt``, UTF-8). A tar without its end of zeros, or with something behind it, is refused: tar
readers take a damaged header for the end, and a cut for one too. So is one in which any of these is a link, a sparse
file, a device or a pipe, whose bytes do not lie behind its header.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO

from configs.encode_schema import WebDatasetSource
from configs.errors import UserError
from pipeline.images.files import files_of
from pipeline.images.source import Source, check_name, is_image, suffix_of
from pipeline.images.source_table import SourceImage
from pipeline.prompts import normalise

_MAX_TEXT_BYTES = 1 << 16
_MAX_MEMBER_BYTES = 1 << 60


class TarMembers(Source):
    """See the module.

    Args:
        config: the tars.
    """

    def __init__(self, config: WebDatasetSource) -> None:
        super().__init__()
        self._storage, self._files = files_of(config.path, ".tar")

    def entries(self) -> Iterator[SourceImage]:
        """The images, each with its class and its prompt."""
        for file in self._files:
            yield from self._entries_of(file)

    def read(self, image: SourceImage) -> bytes:
        """The bytes of an image file."""
        if not image.num_bytes:
            return b""  # object stores refuse to read a range of no bytes
        return self._storage.read_range(image.file, image.at, image.num_bytes)

    def _entries_of(self, file: str) -> Iterator[SourceImage]:
        where = f"{self._storage.uri}/{file}"
        with self._storage.reader(file) as data:
            try:
                with tarfile.open(fileobj=data, mode="r:") as tar:
                    held: SourceImage | None = None
                    last: str | None = None
                    while (info := tar.next()) is not None:
                        tar.members = []  # not to remember all of them
                        if not 0 <= info.size < _MAX_MEMBER_BYTES:  # one below zero leads back, round and round
                            raise tarfile.ReadError(f"a member of {info.size:,} bytes")
                        if info.isdir():
                            continue
                        check_name(info.name, where)
                        folder, _, name = info.name.rpartition("/")
                        key = f"{folder}/{name.partition('.')[0]}"
                        if key != last:
                            yield from self._complete(held, last, where)
                            held, last = SourceImage("", 0, file), key
                        assert held is not None
                        held = self._with_member(held, tar, info, where)
                    yield from self._complete(held, last, where)
                    end = tar.offset
            except tarfile.TarError as error:
                raise UserError(f"{where}: no tar archive, or a damaged one ({error}); copy it again") from None
            if not _is_end(data, end):
                raise UserError(f"{where}: damaged or cut at byte {end:,}, where no end is; copy it again")

    def _complete(self, held: SourceImage | None, key: str | None, where: str) -> Iterator[SourceImage]:
        if held is None:
            return
        if not held.name:
            raise UserError(f"{where}: sample {(key or '').lstrip('/')} has no image; write the tar again without it")
        yield held

    def _with_member(self, held: SourceImage, tar: tarfile.TarFile, info: tarfile.TarInfo, where: str) -> SourceImage:
        suffix = suffix_of(info.name)
        if not is_image(info.name) and suffix not in (".cls", ".txt"):
            self.ignored[suffix] += 1
            return held
        _check_plain(info, where)
        if is_image(info.name):
            if held.name:
                raise UserError(f"{where}: {held.name} and {info.name} are images of one sample; there may be one")
            return replace(held, name=f"{held.file}/{info.name}", num_bytes=info.size, at=info.offset_data)
        file = tar.extractfile(info) if info.size <= _MAX_TEXT_BYTES else None
        try:
            text = file.read().decode() if file else None
            if text is not None and suffix == ".txt":
                return replace(held, prompt=normalise(text))
            if text is not None and text.strip().isascii() and text.strip().isdigit():
                return replace(held, label=int(text))
        except UnicodeDecodeError:
            pass
        what = "text in UTF-8" if suffix == ".txt" else "a class, a number from 0"
        raise UserError(f"{where}: {info.name} is not {what}; write the tar again")


def _check_plain(info: tarfile.TarInfo, where: str) -> None:
    """Raise UserError for a member whose bytes do not lie behind its header, as many as it says."""
    kinds = {
        "a link": info.islnk() or info.issym(),
        "a sparse file": info.issparse(),
        "a device or a pipe": info.isdev(),
    }
    for kind, found in kinds.items():
        if found:
            advice = "write the tar again with --dereference --hard-dereference, without --sparse"
            raise UserError(f"{where}: member {info.name} is {kind}, not a file; {advice}")


def _is_end(data: BinaryIO, start: int) -> bool:
    """Whether there are zeros from byte ``start`` on, and nothing else."""
    data.seek(start)
    has_zeros = False
    while block := data.read(1 << 20):
        if block.count(0) != len(block):
            return False
        has_zeros = True
    return has_zeros
