"""From checkpoints to folders, and what is refused on the way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import UserError
from pipeline.teachers.edm.architecture import CONFIG, WEIGHTS, EdmArchitecture, read_architecture
from pipeline.teachers.edm.convert import convert
from pipeline.teachers.edm.networks import empty_network
from pipeline.teachers.edm.openai_names import names, openai_tensors
from pipeline.teachers.edm.weights import load_weights
from tests.support import nvidia_pickle, tiny_edm
from tests.support.stage import run

FILTER = torch.full((1, 1, 2, 2), 0.25)


def nvidia(
    folder: Path,
    kind: str = "ddpm++",
    edit: Callable[[dict[str, Tensor], dict[str, Any]], None] = lambda tensors, kwargs: None,
    class_name: str = "EDMPrecond",
) -> tuple[Path, EdmArchitecture, dict[str, Tensor]]:
    """A file as NVIDIA's training writes it, with everything that a folder has no use for."""
    import pickle

    described = tiny_edm.architecture(kind)
    weights, kwargs = tiny_edm.weights_of(described), nvidia_pickle.init_kwargs(described)
    tensors = {**weights, "model.map_augment.weight": torch.ones(8, 9)}
    resampled = ("enc.8x8_down.conv0", "dec.16x16_up.conv0", "enc.8x8_down.skip")
    tensors |= {f"model.{name}.resample_filter": FILTER for name in resampled}
    edit(tensors, kwargs)
    kwargs["augment_dim"] = 9
    ema = nvidia_pickle.tree(class_name, kwargs, tensors)
    content = {"ema": ema, "loss_fn": nvidia_pickle.Module("EDMLoss", {}, {}, {}), "dataset_kwargs": {"path": "x"}}
    path = folder / "network.pkl"
    path.write_bytes(pickle.dumps(content, 4))
    return path, described, weights


@pytest.mark.parametrize("kind", ["ddpm++", "adm"])
def test_a_folder_has_the_weights_and_the_arguments_of_the_file(tmp_path: Path, kind: str) -> None:
    path, described, weights = nvidia(tmp_path, kind)
    assert convert(path, tmp_path / "teacher") == described == read_architecture(tmp_path / "teacher" / CONFIG)
    found = load_file(tmp_path / "teacher" / WEIGHTS)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def change(name: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, kwargs: kwargs.update({name: value})


REFUSED = [
    (change("embedding_type", "fourier"), "its embedding_type is 'fourier'; only 'positional'"),
    (change("sigma_max", 100), "its sigma_max is 100"),
    (change("model_type", "ViT"), "its model_type is 'ViT', not SongUNet or DhariwalUNet"),
    (change("turbo", 3), "made with an unknown argument, turbo"),
    (change("num_blocks", -3), "num_blocks: Input should be greater than 0"),
    (change("num_blocks", 2), "another network than the ddpm.. it should be: no model.dec.16x16_block2.affine.bias"),
    (change("label_dim", 11), r"model.map_label.weight has shape \(8, 10\), not \(8, 11\)"),
    (
        change("model_type", "DhariwalUNet"),
        "than the adm it should be: no model.out_conv.bias; model.dec.16x16_aux_conv.bias is not",
    ),
    (lambda tensors, kwargs: tensors.pop("model.map_layer0.bias"), "no model.map_layer0.bias"),
    (lambda tensors, kwargs: tensors.update({"model.more.bias": FILTER}), "model.more.bias is not of it"),
    (
        lambda tensors, kwargs: tensors.update({"model.map_layer0.bias": torch.ones(32).half()}),
        "model.map_layer0.bias is torch.float16, not torch.float32",
    ),
    (
        lambda tensors, kwargs: tensors.update({"model.enc.8x8_down.conv0.resample_filter": FILTER / 2}),
        r"enc.8x8_down.conv0.resample_filter is another filter than \[1, 1\]",
    ),
]


@pytest.mark.parametrize(("edit", "message"), REFUSED)
def test_another_network_is_refused_by_what_differs_and_nothing_is_written(
    tmp_path: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None], message: str
) -> None:
    path, _, _ = nvidia(tmp_path, edit=edit)
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


def test_another_preconditioning_is_refused(tmp_path: Path) -> None:
    path, _, _ = nvidia(tmp_path, class_name="VPPrecond")
    with pytest.raises(UserError, match="its network is a VPPrecond; only EDMPrecond is an EDM teacher"):
        convert(path, tmp_path / "teacher")


def test_the_command_converts_and_refuses_with_exit_code_2(tmp_path: Path) -> None:
    path, _, _ = nvidia(tmp_path)
    done = run("convert_edm", str(path), "--output", str(tmp_path / "teacher"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'teacher'}: ddpm++, 16x16, 10 classes\n")
    path.write_bytes(path.read_bytes()[:-100])
    done = run("convert_edm", str(path), "--output", str(tmp_path / "cut"))
    assert done.returncode == 2
    assert "not a whole pickle of a network" in done.stderr
    with pytest.raises(UserError, match="exists already; name a new folder"):
        convert(path, tmp_path / "teacher")


# ----------------------------------------------------------------------------------------------------- OpenAI

WIDE = {"model_channels": 128, "channel_mult": (1, 1), "noise_scale": 1000.0}
"""guided-diffusion has 32 groups of channels, whatever their number; with 128 that is what there is here."""


def openai_state(described: EdmArchitecture) -> dict[str, Tensor]:
    """Weights by formula under their names, in their shapes."""
    network = empty_network(described, Path("file"))
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    theirs = {theirs: shapes[ours] for ours, theirs in names(network)}
    theirs["label_emb.weight"] = theirs["label_emb.weight"][::-1]
    return tiny_edm.formula_weights(theirs)


@torch.no_grad()
def test_under_openai_s_names_a_network_gives_what_openai_s_code_gives() -> None:
    # Computed once with the code of openai/consistency_models for these weights, its attention in float32.
    described = tiny_edm.architecture("adm", 10, **WIDE)
    network, file = empty_network(described, Path("file")), Path("file")
    load_weights(network, openai_tensors(openai_state(described), described, file), "adm", file)
    x0 = network(*tiny_edm.noisy((0.01, 0.5, 80.0)), torch.eye(10)[[1, 5, 9]])
    expected = [[0.347229, 0.473982, 0.486952], [0.011724, 0.297188, 0.122342], [-0.048956, 0.315428, -0.249468]]
    torch.testing.assert_close(x0[:, :, 5, 7], torch.tensor(expected), atol=2e-5, rtol=0)
    mean_squares = torch.tensor([0.124941, 0.098057, 0.094481])
    torch.testing.assert_close(x0.square().mean((1, 2, 3)), mean_squares, atol=2e-5, rtol=0)


def test_openai_s_file_is_converted_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = tiny_edm.architecture("adm", 10, **WIDE)
    monkeypatch.setattr("pipeline.teachers.edm.convert.OPENAI", described)
    state, path = openai_state(described), tmp_path / "edm.pt"
    torch.save(state, path)
    assert convert(path, tmp_path / "teacher") == described
    label = load_file(tmp_path / "teacher" / WEIGHTS)["model.map_label.weight"]
    assert torch.equal(label, state["label_emb.weight"].T)

    for wrong, message in (
        ({name: tensor for name, tensor in state.items() if name != "out.0.bias"}, "no out.0.bias"),
        ({**state, "out.9.bias": FILTER}, "out.9.bias is not of it"),
        ({**state, "out.0.bias": "text"}, "something else than named tensors"),
        ({**state, "out.0.bias": nvidia_pickle.Module("A", {}, {}, {})}, "not a whole file of tensors alone"),
    ):
        torch.save(wrong, path)
        with pytest.raises(UserError, match=message):
            convert(path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_torch_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "edm.pt"
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(UserError, match="not a whole"):
        convert(path, tmp_path / "teacher")
