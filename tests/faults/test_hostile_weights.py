"""Weights and statistics that are made to hurt: refused in a line, in bounded memory."""

import io
import json
import zipfile

import pytest
import torch
from support.bounds import MEGABYTE, at_most
from support.hostile_arrays import ARRAYS, npy

from configs.errors import UserError
from pipeline.evaluation.reference import Reference
from pipeline.teachers.digest import weights_digest
from trainer.checkpoints.tensor_file import read_tensors


def safetensors(head: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WEIGHTS = {
    "a header beyond the file": safetensors({}, length=2**63),
    "a header of 1 GB": safetensors(b"{}", length=1 << 30),
    "a list": safetensors([1]),
    "another shape": safetensors({"w": ONE | {"shape": [3]}}, bytes(8)),
    "a shape below nothing": safetensors({"w": ONE | {"shape": [-2]}}, bytes(8)),
    "offsets beyond the file": safetensors({"w": ONE | {"data_offsets": [0, 800]}}, bytes(8)),
    "offsets that overlap": safetensors({"w": ONE, "v": ONE}, bytes(8)),
    "an unknown type": safetensors({"w": ONE | {"dtype": "OBJ"}}, bytes(8)),
    "brackets": safetensors(b"[" * 100_000),
    "something behind": safetensors({"w": ONE}, bytes(16)),
}


@pytest.mark.parametrize("data", WEIGHTS.values(), ids=WEIGHTS)
def test_safetensors_that_are_none(tmp_path, data):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    with at_most(16 * MEGABYTE):
        for read in (
            lambda: weights_digest({"network": [path]}, {}),
            lambda: read_tensors(path, {"w": torch.zeros(2)}),
        ):
            with pytest.raises(UserError, match=r"weights.safetensors: not a safetensors file") as caught:
                read()
            assert "\n" not in str(caught.value)


def npz(**arrays: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


GOOD = npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}", bytes(8))
STATISTICS = {
    "no archive": b"PK\x03\x04 not really",
    "cut": npz(mu=GOOD, sigma=GOOD)[:-30],
    "objects": npz(mu=ARRAYS["objects"], sigma=GOOD),
    "a terabyte": npz(mu=ARRAYS["a terabyte"], sigma=GOOD),
    "no numbers": npz(mu=npy("{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}", b"x\0\0\0"), sigma=GOOD),
    "other shapes": npz(mu=GOOD, sigma=GOOD),
}


@pytest.mark.parametrize("data", STATISTICS.values(), ids=STATISTICS)
def test_statistics_that_are_none(tmp_path, data):
    (tmp_path / "reference.npz").write_bytes(data)
    with at_most(16 * MEGABYTE), pytest.raises(UserError, match=r"reference.npz: ") as caught:
        Reference.read(tmp_path / "reference.npz", "")
    assert "\n" not in str(caught.value)


def test_statistics_that_unpack_to_more_than_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.metrics.frechet.MAX_NPZ_BYTES", 1000)
    (tmp_path / "reference.npz").write_bytes(npz(mu=GOOD, sigma=bytes(10**6)))
    with pytest.raises(UserError, match=r"1,000,\d+ bytes when unpacked, more than the 1,000 allowed"):
        Reference.read(tmp_path / "reference.npz", "")
