"""Durable writes into local folders: what a cloud store promises, and obstore's local store does not."""

import os
import secrets
import shutil
from pathlib import Path

STAGING_PREFIX = ".staging-"
"""Files of this name are writes in progress, or left by a writer that died: see :meth:`Storage.leftovers`."""
BUFFER_BYTES = 1 << 20
"""What is copied at a time."""


def put_local(target: Path, source: bytes | Path, *, create: bool) -> bool:
    """Write ``target`` so that its name never shows anything but its whole content, even after power loss.

    Order matters: data to the disk, then the name, then the folder that holds the name. A hard link is the create-only
    rename of POSIX; unlike O_EXCL on the target it never shows an empty file.
    """
    _make_folder(target.parent)
    staging = target.with_name(STAGING_PREFIX + secrets.token_hex(8))
    try:
        with staging.open("xb") as file:
            if isinstance(source, Path):
                with source.open("rb") as content:
                    shutil.copyfileobj(content, file, BUFFER_BYTES)
            else:
                file.write(source)
            file.flush()
            os.fsync(file.fileno())
        if create:
            try:
                os.link(staging, target)
            except FileExistsError:
                # NFS may repeat a link whose reply was lost, and then finds its own: the link count tells (open(2)).
                if staging.stat().st_nlink != 2:
                    return False
        else:
            staging.replace(target)
        _sync_folder(target.parent)
        return True
    finally:
        staging.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
