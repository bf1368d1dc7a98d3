"""Pickles are programs: what is in them must not run, whatever it is, and what is whole must come out as it went in."""

import io
import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from pipeline.teachers.edm.inert_pickle import RecordedModule, read_pickle
from tests.support import nvidia_pickle

MARK = "the-mark"


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def written(folder: Path, content: object, protocol: int = 4) -> Path:
    path = folder / "network.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def by_name(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls any function by name, written out: most could not be written otherwise."""
    body = b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"
    return b"\x80\x04" + body + b"X" + struct.pack("<I", len(argument)) + argument.encode() + b"\x85R."


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_call_of_the_system_is_refused_by_name_and_not_made(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / MARK
    path = written(tmp_path, {"ema": Calls(os.system, f"touch {mark}")}, protocol)
    with pytest.raises(UserError, match=r"refused, and nothing of it was run: it asks for (posix|nt)\.system"):
        read_pickle(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # so the file is what it is said to be


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "__import__"),
        ("builtins", "getattr"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("numpy", "load"),
        ("importlib", "import_module"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.storage", "_load_from_bytes.__class__"),
        ("collections", "OrderedDict.fromkeys"),
        ("pipeline.teachers.edm.inert_pickle", "_KNOWN"),
    ],
)
def test_names_that_no_network_needs_are_refused(tmp_path: Path, module: str, name: str) -> None:
    mark = tmp_path / MARK
    (tmp_path / "network.pkl").write_bytes(by_name(module, name, f"open({str(mark)!r}, 'w').close()"))
    with pytest.raises(UserError, match=f"it asks for {module}.{name}, which a network does not need"):
        read_pickle(tmp_path / "network.pkl")
    assert not mark.exists()


def test_source_code_in_the_file_is_left_where_it_is(tmp_path: Path) -> None:
    mark = tmp_path / MARK
    source = f"open({str(mark)!r}, 'w').close()"
    module = nvidia_pickle.Module("EDMPrecond", {"label_dim": 3}, {}, {}, source=source)
    found = read_pickle(written(tmp_path, {"ema": module}))
    assert isinstance(found["ema"], RecordedModule)
    assert found["ema"].arguments(()) == {"label_dim": 3}
    assert not mark.exists()


def test_a_call_within_a_module_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / MARK
    hostile = nvidia_pickle.Module("Linear", {}, {"weight": Calls(os.system, f"touch {mark}")}, {})
    path = written(tmp_path, {"ema": nvidia_pickle.Module("EDMPrecond", {}, {}, {"model": hostile})})
    with pytest.raises(UserError, match=r"it asks for posix\.system"):
        read_pickle(path)
    assert not mark.exists()


def test_a_call_within_the_bytes_of_a_tensor_is_not_made(tmp_path: Path) -> None:
    mark = tmp_path / MARK
    inner = io.BytesIO()
    torch.save(Calls(os.system, f"touch {mark}"), inner)
    content = Calls(torch.storage._load_from_bytes, inner.getvalue())
    with pytest.raises(UserError, match="not a whole pickle of a network"):
        read_pickle(written(tmp_path, {"ema": content}))
    assert not mark.exists()


def test_what_it_is_given_cannot_be_changed(tmp_path: Path) -> None:
    """BUILD on a function or a class sets its attributes, where nothing forbids it."""
    for module, name in (
        ("torch._utils", "_rebuild_parameter"),
        ("collections", "OrderedDict"),
        ("torch.nn.modules.container", "ModuleDict"),
    ):
        load = by_name(module, name, "")[:-8]
        assert load.endswith(b"\x93")
        state = pickle.dumps((None, {"__call__": 5, "recorded": 5}), 4)[2:-1]
        (tmp_path / "network.pkl").write_bytes(load + state + b"b.")
        with pytest.raises(UserError):
            read_pickle(tmp_path / "network.pkl")
    whole = nvidia_pickle.Module("EDMPrecond", {}, {"weight": torch.ones(2)}, {})
    found = read_pickle(written(tmp_path, {"ema": whole}))
    assert found["ema"].tensors()["weight"].tolist() == [1, 1]


def test_objects_outside_of_the_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "network.pkl").write_bytes(b"\x80\x02X\x01\x00\x00\x00aQ.")
    with pytest.raises(UserError, match="refers to objects outside of the file"):
        read_pickle(tmp_path / "network.pkl")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_numbers_and_arguments_come_out_as_they_went_in(tmp_path: Path, protocol: int) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {"a": torch.nn.Parameter(base[1:, ::2]), "b": base.T, "c": torch.tensor(7.5), "d": torch.ones(3).half()}
    inner = nvidia_pickle.Module("Conv2d", {"kernel": 3}, tensors, {})
    extra = {"scale": np.sqrt(0.5), "flag": np.bool_(True), "left": OrderedDict(x=None), "names": {"a", "b"}}
    top = nvidia_pickle.Module("EDMPrecond", {"channel_mult": [1, 2]}, {}, {"model": inner}, attributes=extra)
    found = read_pickle(written(tmp_path, {"ema": top, "dataset_kwargs": {"path": "x"}}, protocol))["ema"]
    assert found.class_name == "EDMPrecond"
    assert found.arguments(()) == {"channel_mult": [1, 2]}
    assert {name: found.attributes[name] for name in extra} == {
        "scale": float(np.sqrt(0.5)), "flag": True, "left": {"x": None}, "names": {"a", "b"},
    }  # fmt: skip
    read = found.tensors()
    assert read.keys() == {f"model.{name}" for name in tensors}
    for name, tensor in tensors.items():
        assert read[f"model.{name}"].dtype == tensor.dtype
        assert torch.equal(read[f"model.{name}"], tensor)


def test_a_view_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    storage = torch.arange(4.0).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    view = Calls(torch._utils._rebuild_tensor_v2, typed, 2, (4,), (1,), False, OrderedDict())
    with pytest.raises(UserError, match="not a whole pickle"):
        read_pickle(written(tmp_path, {"ema": view}))


def test_another_version_of_the_persistence_is_refused(tmp_path: Path) -> None:
    top = nvidia_pickle.Module("EDMPrecond", {}, {}, {}, version=7)
    with pytest.raises(UserError, match="it has a class of persistence version 7"):
        read_pickle(written(tmp_path, {"ema": top}))


def test_modules_without_an_end_are_refused(tmp_path: Path) -> None:
    top = nvidia_pickle.Module("EDMPrecond", {}, {}, {})
    found = read_pickle(written(tmp_path, {"ema": top}))["ema"]
    found.attributes["_modules"]["again"] = found
    with pytest.raises(ValueError, match="nested without an end"):
        found.tensors()


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    module = nvidia_pickle.Module("EDMPrecond", {}, {"weight": torch.ones(300)}, {})
    content = pickle.dumps({"ema": module}, 4)
    ends = {position for _, _, position in pickletools.genops(content)}
    for end in [*sorted(ends)[1::7], len(content) // 2, len(content) - 1, 0]:
        (tmp_path / "cut.pkl").write_bytes(content[:end])
        with pytest.raises(UserError, match="not a whole pickle of a network"):
            read_pickle(tmp_path / "cut.pkl")
