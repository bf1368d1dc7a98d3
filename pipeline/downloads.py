"""Files that others publish and libraries keep, fetched when they are missing: whole or not at all."""

from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError

from configs.errors import UserError


class NotPublished(UserError):
    """The server was asked, and has no such file."""


def downloaded(url: str, path: Path, what: str, otherwise: str) -> Path:
    """A file where a library keeps it, downloaded if it is not there yet.

    Args:
        url: its address.
        path: where it belongs.
        what: it is, for people.
        otherwise: what to do where there is no network.

    Returns:
        ``path``.

    Raises:
        NotPublished: it is not there, and not at its address either.
        UserError: it is not there and cannot be downloaded, or not be written.
    """
    from torch.hub import download_url_to_file

    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(url, str(path))
        except OSError as error:
            is_absent = isinstance(error, HTTPError) and error.code == HTTPStatus.NOT_FOUND
            raise (NotPublished if is_absent else UserError)(
                f"{what}: {path} is not there and cannot be downloaded ({error}); get {url} and {otherwise}"
            ) from error
    return path
