"""The files of a source that is one file, or a folder of them."""

from pathlib import PurePosixPath

from configs.errors import UserError
from pipeline.shards.storage import Storage


def files_of(path: str, suffix: str) -> tuple[Storage, list[str]]:
    """The folder, and the names of the files with ``suffix`` in it, sorted; of one file its folder and its name.

    Raises:
        UserError: there are none.
    """
    if PurePosixPath(path).suffix == suffix:
        storage, name = Storage.of_file(path)
        if not storage.exists(name):
            raise UserError(f"source.path: there is no {path}")
        return storage, [name]
    storage = Storage.open(path)
    names = sorted(info.path for info in storage.list() if info.path.endswith(suffix))
    if not names:
        raise UserError(f"source.path: {path} holds no {suffix}")
    return storage, names
