"""Which code and which libraries made something."""

import hashlib
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_LIBRARIES = ("torch", "numpy", "diffusers", "transformers", "accelerate", "webdataset", "pillow", "pyarrow")


@cache
def code_revision() -> str:
    """The git revision, with ``-dirty`` if files differ from it; outside a checkout ``tree-`` and a source digest.

    A Ray job runs in a copy of the working directory without its ``.git``, hence the second form: the first 12 hex
    digits of a sha256 over the Python sources, the same wherever the same code runs.
    """
    if (_ROOT / ".git").exists() and shutil.which("git"):
        described = subprocess.run(
            ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
        if described.returncode == 0:
            return described.stdout.strip()
    digest = hashlib.sha256()
    for package in ("configs", "pipeline", "stages", "trainer"):
        for source in sorted((_ROOT / package).rglob("*.py")):
            digest.update(f"{source.relative_to(_ROOT).as_posix()}\0".encode() + source.read_bytes())
    return f"tree-{digest.hexdigest()[:12]}"


@cache
def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that touch the numbers or the bytes."""
    versions: dict[str, str] = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions
