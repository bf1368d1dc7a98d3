"""Damaged Parquet is one kind of error, with one line; an error of the storage that it is read from is another.

pyarrow answers damaged bytes with a dozen exceptions of its own, with plain ones and with messages of several lines.
Those of the storage carry the system's number of the error.
"""

from collections.abc import Generator
from contextlib import contextmanager

import pyarrow as pa


class DamagedParquet(ValueError):
    """Bytes that are not Parquet, or not all of them: why, in one line."""


@contextmanager
def reading_parquet() -> Generator[None]:
    """Read Parquet in the body: a file that is opened, a row group, texts that are taken out of Arrow.

    Raises:
        DamagedParquet: the bytes are damaged.
        OSError: the storage failed.
    """
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedParquet(" ".join(str(error).split())) from None
