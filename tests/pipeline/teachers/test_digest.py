import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from configs.errors import UserError
from pipeline.teachers import digest
from pipeline.teachers.digest import weights_digest, without_volatile

SETTINGS = {"vae": {"scaling_factor": 0.18215}}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": rng.standard_normal((4, 3, 3), dtype=np.float32),
        "conv.bias": rng.standard_normal(4).astype(np.float16),
        "a.scalar": np.array(3, dtype=np.int64),
        "z.empty": np.zeros((0, 2), dtype=np.float32),
    }


def write(path: Path, content: dict[str, np.ndarray]) -> list[Path]:
    save_file(content, path)
    return [path]


def test_is_the_hash_its_docstring_says(tmp_path: Path) -> None:
    content = {"b": np.array([1.5, -2.0], dtype=np.float32), "a": np.array([[7]], dtype=np.int64)}
    expected = hashlib.sha256(
        b'{"vae":{"scaling_factor":0.18215}}'
        + b'["unet","a","I64",[1,1]]'
        + content["a"].tobytes()
        + b'["unet","b","F32",[2]]'
        + content["b"].tobytes()
    )
    assert weights_digest({"unet": write(tmp_path / "x.safetensors", content)}, SETTINGS) == expected.hexdigest()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.integers(0, 2), min_size=4, max_size=4), order=st.permutations(range(4)))
def test_does_not_depend_on_files_or_order(tmp_path: Path, places: list[int], order: list[int]) -> None:
    content = tensors()
    whole = write(tmp_path / "whole.safetensors", content)
    names = [list(content)[i] for i in order]
    parts = [{n: content[n] for n, p in zip(names, places, strict=True) if p == part} for part in range(3)]
    split = [write(tmp_path / f"part{i}.safetensors", part)[0] for i, part in enumerate(parts) if part]
    assert weights_digest({"unet": split}, SETTINGS) == weights_digest({"unet": whole}, SETTINGS)


def test_depends_on_every_bit_name_dtype_shape_component_and_setting(tmp_path: Path) -> None:
    content = tensors()
    changed = {name: array.copy() for name, array in content.items()}
    changed["conv.weight"].view(np.uint32).flat[7] ^= 1
    renamed = {f"{name}2" if name == "a.scalar" else name: array for name, array in content.items()}
    reshaped = content | {"conv.weight": content["conv.weight"].reshape(3, 4, 3)}
    retyped = content | {"conv.weight": content["conv.weight"].view(np.int32)}
    files = [write(tmp_path / f"{i}", c) for i, c in enumerate([content, changed, renamed, reshaped, retyped])]
    digests = [weights_digest({"unet": paths}, SETTINGS) for paths in files]
    digests.append(weights_digest({"vae": files[0]}, SETTINGS))
    digests.append(weights_digest({"unet": files[0]}, {"vae": {"scaling_factor": 0.18216}}))
    assert len(set(digests)) == len(digests)


def test_reads_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"unet": write(tmp_path / "x", tensors())}
    whole = weights_digest(files, SETTINGS)
    monkeypatch.setattr(digest, "BLOCK_BYTES", 7)
    assert all(len(block) <= 7 for t in digest.stored_tensors(files["unet"]).values() for block in t.blocks())
    assert weights_digest(files, SETTINGS) == whole


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_refuses_a_file_cut_short(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "x.safetensors", tensors())[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"x\.safetensors"):
        weights_digest({"unet": [path]}, SETTINGS)


def test_refuses_a_tensor_in_two_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, tensors())[0] for name in ("one", "two")]
    with pytest.raises(UserError, match=r"two: tensor .* is also in one"):
        weights_digest({"unet": paths}, SETTINGS)


def test_volatile_entries_are_those_about_the_file() -> None:
    config = {"_class_name": "A", "_diffusers_version": "1", "transformers_version": "2", "torch_dtype": "float16"}
    assert without_volatile(config | {"sample_size": 64}) == {"sample_size": 64}
    assert json.loads(digest.canonical_json({"b": 1, "a": [1.5, None]})) == {"a": [1.5, None], "b": 1}
