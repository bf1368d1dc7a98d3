"""A dataset of pairs, or of real images, at a root: its identity, and which of its shards exist.

The state of a run *is* the set of commit records on storage. Resuming is: read ``run.json``, compare, list
``commits/``, do the rest. Never is a shard believed to exist because a tar of its name lies around.
"""

import json
import re
from typing import Any, cast

from pydantic import ValidationError

from configs.errors import UserError
from configs.fingerprint import differences, fingerprint
from configs.json_text import parse_json
from configs.schema import FORMAT_VERSION, NOISE_RECIPE
from pipeline.shards.layout import RUN, SEALED, commit_path, parked_path
from pipeline.shards.records import Commit, DamagedRecord, Run
from pipeline.shards.storage import Storage

_COMMIT = re.compile(r"commits/(\d{6})\.json")
_PARKED = re.compile(r"parked/(\d{6})\.json")


class Dataset:
    """A dataset that has a ``run.json``.

    Attributes:
        storage: where it lies.
        run: what its ``run.json`` says.
    """

    def __init__(self, storage: Storage, run: Run) -> None:
        self.storage = storage
        self.run = run

    @staticmethod
    def open(storage: Storage) -> "Dataset":
        """Open an existing dataset of pairs.

        Raises:
            UserError: as :meth:`open_any`, or it holds images.
            DamagedRecord: ``run.json`` was edited or damaged.
        """
        dataset = Dataset.open_any(storage)
        if dataset.run.holds != "pairs":
            raise UserError(f"{storage.uri}: holds real images, and pairs are needed; name a root of generate_pairs.py")
        return dataset

    @staticmethod
    def open_any(storage: Storage) -> "Dataset":
        """Open an existing dataset, of pairs or of images.

        Raises:
            UserError: there is no ``run.json``, or it is of another version of the format or of the noise.
            DamagedRecord: ``run.json`` was edited or damaged.
        """
        try:
            data = storage.read(RUN)
        except FileNotFoundError:
            raise UserError(
                f"{storage.uri}: no {RUN}, so not a pair dataset; name a root that generate_pairs.py wrote"
            ) from None
        _check_version(data, f"{storage.uri}/{RUN}")
        try:
            run = Run.model_validate_json(data)
        except ValidationError as error:
            raise DamagedRecord(
                f"{storage.uri}/{RUN}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            ) from None
        if fingerprint(run.spec) != run.fingerprint:
            raise DamagedRecord(
                f"{storage.uri}/{RUN}: the spec does not match its fingerprint; it was edited or damaged"
            )
        return Dataset(storage, run)

    @staticmethod
    def create_or_open(storage: Storage, run: Run) -> "Dataset":
        """Create ``run.json``, or check that the one that exists asks for the same samples in the same shards.

        Raises:
            UserError: the root holds something else, or a dataset of another spec or layout.
        """
        if not storage.exists(RUN):
            if not storage.is_empty():
                raise UserError(f"{storage.uri}: not empty and not a pair dataset; name an empty or a new output")
            if storage.create(RUN, run.to_json()):
                return Dataset(storage, run)
        existing = Dataset.open_any(storage)
        if existing.run.holds != run.holds:
            raise UserError(f"{storage.uri}: holds {existing.run.holds}, not {run.holds}; name a new output")
        there = {
            "spec": existing.run.spec.model_dump(mode="json"),
            "layout": existing.run.layout.model_dump(mode="json"),
        }
        here = {"spec": run.spec.model_dump(mode="json"), "layout": run.layout.model_dump(mode="json")}
        differing = differences(there, here)
        if differing:
            listed = "; ".join(f"{name} is {old!r} there, {new!r} here" for name, old, new in differing)
            raise UserError(
                f"{storage.uri}: holds another dataset ({listed}); restore these settings or name a new output"
            )
        return existing

    def committed(self) -> set[int]:
        """Numbers of the shards that exist, by one listing."""
        return self._numbers("commits/", _COMMIT)

    def parked(self) -> set[int]:
        """Numbers of the shards that failed in an earlier run and have not been made since."""
        return self._numbers("parked/", _PARKED) - self.committed()

    def _numbers(self, prefix: str, pattern: re.Pattern[str]) -> set[int]:
        matches = (pattern.fullmatch(info.path) for info in self.storage.list(prefix))
        return {int(match.group(1)) for match in matches if match}

    def commit(self, shard: int) -> Commit | None:
        """The commit record of a shard, or None while it does not exist.

        Raises:
            DamagedRecord: it is not one, or of another dataset.
        """
        path = commit_path(shard)
        try:
            commit = Commit.from_json(self.storage.read(path), path)
        except FileNotFoundError:
            return None
        if commit.fingerprint != self.run.fingerprint:
            raise DamagedRecord(
                f"{path}: belongs to dataset {commit.fingerprint[:12]}, this is {self.run.fingerprint[:12]}"
            )
        return commit

    def park(self, shard: int, reason: bytes) -> None:
        """Leave a note on a shard that failed. A later run tries it again."""
        self.storage.write(parked_path(shard), reason)

    def unpark(self) -> None:
        """Remove the notes: this run tries those shards again."""
        for info in list(self.storage.list("parked/")):
            self.storage.delete(info.path)

    def withdraw(self, shard: int, reason: str) -> None:
        """Undo the commit of a damaged shard, so that the next run makes it again; the record goes to ``parked/``."""
        path = commit_path(shard)
        try:
            record = self.storage.read(path).decode(errors="replace")
        except FileNotFoundError:
            record = ""
        self.park(shard, json.dumps({"shard": shard, "reason": reason, "withdrawn": record}, indent=1).encode())
        self.unseal()
        self.storage.delete(path)

    def unseal(self) -> None:
        """Take back that the dataset is finished: the next run makes what is missing and writes the manifest again."""
        self.storage.delete(SEALED)

    @property
    def sealed(self) -> dict[str, Any] | None:
        """What ``SEALED.json`` says, or None while shards are missing.

        Raises:
            DamagedRecord: it is not what was written.
        """
        try:
            sealed = parse_json(self.storage.read(SEALED))
        except FileNotFoundError:
            return None
        except ValueError:
            raise DamagedRecord(f"{SEALED}: not JSON; verify_shards.py --repair removes it") from None
        if not isinstance(sealed, dict):
            raise DamagedRecord(f"{SEALED}: not a record; verify_shards.py --repair removes it")
        return cast(dict[str, Any], sealed)


def _check_version(data: bytes, where: str) -> None:
    """Refuse what this code would misread; before the record is parsed, as another version may have other keys.

    A record that does not name its versions is left to the strict parser, and to the fingerprint.
    """
    try:
        spec = parse_json(data)["spec"]
        found = {name: spec[name] for name in ("format_version", "noise_recipe") if name in spec}
    except (ValueError, KeyError, TypeError):
        return
    for name, expected in (("format_version", FORMAT_VERSION), ("noise_recipe", NOISE_RECIPE)):
        if found.get(name, expected) != expected:
            raise UserError(
                f"{where}: {name} is {found[name]!r}, this code knows {expected!r} only; "
                "use the version of the code that made the dataset"
            )
