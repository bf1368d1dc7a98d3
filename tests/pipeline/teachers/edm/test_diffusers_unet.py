"""A UNet2DModel with our preconditioning is what it is with diffusers' own schedulers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler, UNet2DModel
from torch import Tensor, nn

from configs.schema import EdmTeacherConfig
from pipeline import teachers
from pipeline.teachers.edm.diffusers_unet import DiffusersUNet
from pipeline.teachers.edm.networks import empty_network
from pipeline.teachers.edm.openai_names import openai_tensors
from pipeline.teachers.edm.preconditioning import EdmNetwork
from pipeline.teachers.edm.weights import load_weights
from tests.pipeline.teachers.edm.test_convert import WIDE, openai_state
from tests.support import tiny_edm, tiny_unet

SIGMAS = (0.002, 0.05, 0.5, 3.0, 80.0)
CLASSES = [1, 5, 9, 0, 5]
KINDS = {"plain": tiny_unet.PLAIN, "openai": tiny_unet.OPENAI}


def conditions() -> Tensor:
    return torch.eye(10)[CLASSES]


def noisy() -> tuple[Tensor, Tensor]:
    return tiny_edm.noisy(SIGMAS, tiny_unet.SIZE)


def network(**settings: Any) -> EdmNetwork:
    """With the preconditioning of EDMEulerScheduler."""
    theirs = tiny_unet.unet(**settings)
    made = DiffusersUNet(dict(theirs.config))
    made.unet.load_state_dict(theirs.state_dict())
    return EdmNetwork(made, 0.5, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("classes", [10, None])
@torch.no_grad()
def test_the_denoiser_is_that_of_diffusers_edm_schedulers(
    tmp_path: Path, scheduler: str, kind: str, classes: int | None
) -> None:
    folder = tiny_unet.build(tmp_path, scheduler, sigma_data=0.4, num_class_embeds=classes, kind=KINDS[kind])
    teacher = teachers.load(EdmTeacherConfig(path=str(folder)), torch.device("cpu"))
    x_t, sigmas = noisy()
    condition = conditions() if classes else torch.zeros(len(x_t), 0)
    x0 = teacher.denoiser(x_t, sigmas, condition)

    theirs = tiny_unet.SCHEDULERS[scheduler].from_pretrained(folder / "scheduler")
    unet = UNet2DModel.from_pretrained(folder / "unet")
    labels = torch.tensor(CLASSES) if classes else None
    sigma = sigmas[:, None, None, None]
    output = unet(theirs.precondition_inputs(x_t, sigma), theirs.precondition_noise(sigmas), class_labels=labels).sample
    torch.testing.assert_close(x0, theirs.precondition_outputs(x_t, output, sigma), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_denoiser_is_that_of_diffusers_consistency_scheduler(tmp_path: Path, kind: str) -> None:
    folder = tiny_unet.build(tmp_path, "CMStochasticIterativeScheduler", sigma_data=0.4, kind=KINDS[kind])
    teacher = teachers.load(EdmTeacherConfig(path=str(folder)), torch.device("cpu"))
    theirs = CMStochasticIterativeScheduler.from_pretrained(folder / "scheduler")
    unet = UNet2DModel.from_pretrained(folder / "unet")
    theirs.set_timesteps(timesteps=list(range(39, -1, -3)))
    for i, t in enumerate(theirs.timesteps):
        sigma = theirs.sigmas[i]
        x = tiny_edm.noisy((float(sigma),), tiny_unet.SIZE)[0]
        theirs._step_index = None  # of a pipeline that begins here
        told = torch.tensor(theirs.sigma_to_t(float(sigma)))  # `t` is of the level before its rounding
        torch.testing.assert_close(told, t, atol=1e-4, rtol=0)
        output = unet(theirs.scale_model_input(x, t), told, class_labels=torch.tensor([3])).sample
        c_skip, c_out = theirs.get_scalings(sigma)
        x0 = teacher.denoiser(x, sigma, torch.eye(10)[[3]])
        torch.testing.assert_close(x0, c_skip * x + c_out * output, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_v_prediction_is_epsilon_with_the_other_sign() -> None:
    # The advice of the message that refuses it.
    x, output, sigma = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.tensor(2.0)
    v, eps = (EDMEulerScheduler(prediction_type=kind) for kind in ("v_prediction", "epsilon"))
    assert torch.equal(v.precondition_outputs(x, output, sigma), eps.precondition_outputs(x, -output, sigma))


@torch.no_grad()
def test_a_row_of_zeros_is_no_class() -> None:
    conditional, unconditional = network(kind=tiny_unet.OPENAI), network(num_class_embeds=None, kind=tiny_unet.OPENAI)
    weights = conditional.model.unet.state_dict()
    del weights["class_embedding.weight"]
    unconditional.model.unet.load_state_dict(weights)
    x_t, sigma = noisy()
    x0 = conditional(x_t, sigma, torch.zeros(len(x_t), 10))
    assert torch.equal(x0, unconditional(x_t, sigma, torch.zeros(len(x_t), 0)))
    assert not torch.allclose(x0, conditional(x_t, sigma, conditions()), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_low_precision_ends_at_the_layers(kind: str) -> None:
    exact, low = (network(kind=KINDS[kind]) for _ in range(2))
    assert low.cast_layers(torch.bfloat16).layer_dtype == torch.bfloat16
    told = {
        name: parameter.dtype
        for name, parameter in low.model.unet.named_parameters()
        if name.startswith(("time_embedding", "class_embedding")) or "time_emb_proj" in name
    }
    assert set(told.values()) == {torch.float32}
    others = {name: p.dtype for name, p in low.model.unet.named_parameters() if name not in told}
    assert set(others.values()) == {torch.bfloat16}
    assert any("to_q" in name for name in others)

    # At sigma = 0.002 the answer is the image itself: an image rounded to bfloat16 would be wrong by up to 0.004.
    x_t, sigma = tiny_edm.noisy((0.002,) * 5, tiny_unet.SIZE)
    embeddings: list[Tensor] = []
    for made in (exact, low):
        made.model.unet.time_embedding.register_forward_hook(lambda layer, inputs, output: embeddings.append(output))
    difference = (low(x_t, sigma, conditions()) - exact(x_t, sigma, conditions())).abs().max()
    assert 0 < difference < 5e-4
    assert torch.equal(*embeddings)


def test_under_autocast_coefficients_stay_float32() -> None:
    x_t, sigma = tiny_edm.noisy((0.002,) * 5, tiny_unet.SIZE)
    made = network(kind=tiny_unet.OPENAI)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x0 = made(x_t, sigma, conditions())
    assert x0.dtype == torch.float32
    assert 0 < (x0 - made(x_t, sigma, conditions())).abs().max() < 5e-4


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_what_is_told_of_noise_and_class_is_the_same_to_the_last_bit(kind: str) -> None:
    made = network(kind=KINDS[kind])
    embeddings: list[Tensor] = []
    projections: list[Tensor] = []
    unet = made.model.unet
    for layer in (unet.time_embedding.linear_1, unet.time_embedding.linear_2, unet.class_embedding):
        layer.register_forward_hook(lambda layer, inputs, output: embeddings.append(output))
    blocks = [layer for name, layer in unet.named_modules() if name.endswith("time_emb_proj")]
    for layer in blocks:
        layer.register_forward_hook(lambda layer, inputs, output: projections.append(output))
    exact = made(*noisy(), conditions())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x0 = made(*noisy(), conditions())
    assert not torch.equal(x0, exact)  # the layers that see the image did run in bfloat16
    assert (len(embeddings), len(projections)) == (6, 2 * len(blocks))
    for low, high in zip(embeddings[3:], embeddings, strict=False):
        assert torch.equal(low, high)
    for low, high in zip(projections[len(blocks) :], projections, strict=False):
        assert torch.equal(low, high.bfloat16())  # rounded once, to what it is added to


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    def gradients(made: EdmNetwork) -> list[Tensor]:
        made(*noisy(), conditions()).square().mean().backward()
        return [parameter.grad for parameter in made.parameters()]

    plain, saving = network(kind=KINDS[kind]), network(kind=KINDS[kind])
    saving.enable_gradient_checkpointing()
    calls: list[int] = []
    saving.model.unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for one, other in zip(gradients(plain), gradients(saving), strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == 2


def test_there_is_no_dropout(tmp_path: Path) -> None:
    folder = tiny_unet.build(tmp_path, dropout=0.5, kind=tiny_unet.PLAIN)
    made = teachers.load_network(EdmTeacherConfig(path=str(folder)))
    assert made.training
    assert {layer.p for layer in made.modules() if isinstance(layer, nn.Dropout)} == {0.0}


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_company() -> None:
    made, (x_t, sigma) = network(kind=tiny_unet.PLAIN), noisy()
    together = made(x_t, sigma, conditions())
    for i in range(len(x_t)):
        alone = made(x_t[i : i + 1], sigma[i], conditions()[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------- OpenAI

_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_out.0": "proj_out",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCKS = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0": "input_blocks.2.0",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0": "output_blocks.1.2",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}


def from_openai(state: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The tensor that a parameter of a UNet2DModel of two levels and one block is under OpenAI's names."""
    module, _, parameter = name.rpartition(".")
    if module in _OUTSIDE:
        return state[f"{_OUTSIDE[module]}.{parameter}"]
    block = next(block for block in _BLOCKS if name.startswith(f"{block}."))
    layer = module.removeprefix(f"{block}.")
    if layer in ("to_q", "to_k", "to_v"):
        third = ("to_q", "to_k", "to_v").index(layer)
        return state[f"{_BLOCKS[block]}.qkv.{parameter}"].chunk(3)[third].reshape(like.shape)
    return state[f"{_BLOCKS[block]}.{_LAYERS[layer]}.{parameter}"].reshape(like.shape)


@torch.no_grad()
def test_openai_s_file_is_one_teacher_by_way_of_diffusers_and_by_our_own() -> None:
    described, file = tiny_edm.architecture("adm", 10, **WIDE), Path("file")
    state = openai_state(described)
    ours = empty_network(described, file)
    load_weights(ours, openai_tensors(state, described, file), "adm", file)

    settings = {**tiny_unet.OPENAI, "block_out_channels": (128, 128), "norm_num_groups": 32, "attention_head_dim": 64}
    made = DiffusersUNet(
        {**settings, "sample_size": 16, "layers_per_block": 1, "num_class_embeds": 10, "attn_norm_num_groups": 32}
    )
    expected = made.unet.state_dict()
    made.unet.load_state_dict({name: from_openai(state, name, like) for name, like in expected.items()})
    arguments = *tiny_edm.noisy((0.01, 0.5, 80.0)), torch.eye(10)[[1, 5, 9]]
    torch.testing.assert_close(EdmNetwork(made.eval(), 0.5, 1000.0)(*arguments), ours(*arguments), atol=2e-5, rtol=0)
