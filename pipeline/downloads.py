"""Files that others publish and libraries keep, fetched when they are missing: whole or not at all."""

from pathlib import Path

from configs.errors import UserError


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
        UserError: it is not there and cannot be downloaded, or not be written.
    """
    from torch.hub import download_url_to_file

    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(url, str(path))
        except OSError as error:
            raise UserError(
                f"{what}: {path} is not there and cannot be downloaded ({error}); get {url} and {otherwise}"
            ) from error
    return path
