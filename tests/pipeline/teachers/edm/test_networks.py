"""The networks against numbers that the published implementation gave for the same weights; what precision they keep.

The numbers were computed once, with the authors' code, from the formula of tests/support/tiny_edm.py.
"""

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from pipeline.teachers.edm.networks import edm_network
from pipeline.teachers.edm.preconditioning import EdmNetwork
from tests.support import tiny_edm

SIGMAS = (0.01, 0.5, 80.0)
CLASSES = [1, 5, 9]
PINNED = {
    ("ddpm++", 0): (
        [[0.348665, 0.471905, 0.491481], [0.13661, 0.223742, 0.142968], [-0.370446, -0.044462, -0.087491]],
        [0.125023, 0.112323, 0.085233],
    ),
    ("ddpm++", 10): (
        [[0.345463, 0.471535, 0.490932], [0.11969, 0.223886, 0.221959], [-0.358212, -0.176989, -0.202229]],
        [0.125362, 0.109665, 0.134746],
    ),
    ("adm", 0): (
        [[0.340312, 0.482028, 0.492384], [-0.06336, 0.592619, 0.191486], [-0.252797, 0.251631, -0.167056]],
        [0.12431, 0.106222, 0.12962],
    ),
    ("adm", 10): (
        [[0.357038, 0.462219, 0.496561], [0.604422, -0.251907, 0.287397], [-0.198311, -0.440552, 0.297068]],
        [0.124017, 0.128622, 0.160119],
    ),
}
"""Kind and number of classes -> a pixel of each image, and the images' mean squares."""


def network(kind: str = "ddpm++", label_dim: int = 10) -> EdmNetwork:
    described = tiny_edm.architecture(kind, label_dim)
    made = edm_network(described)
    made.load_state_dict(tiny_edm.weights_of(described))
    return made


def condition(label_dim: int) -> Tensor:
    return torch.eye(label_dim)[CLASSES] if label_dim else torch.zeros(3, 0)


@pytest.mark.parametrize(("kind", "label_dim"), PINNED)
@torch.no_grad()
def test_a_network_gives_what_the_published_implementation_gives(kind: str, label_dim: int) -> None:
    x0 = network(kind, label_dim)(*tiny_edm.noisy(SIGMAS), condition(label_dim))
    pixels, mean_squares = PINNED[kind, label_dim]
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0[:, :, 5, 7], torch.tensor(pixels), atol=4e-6, rtol=0)
    torch.testing.assert_close(x0.square().mean((1, 2, 3)), torch.tensor(mean_squares), atol=4e-6, rtol=0)


@pytest.mark.parametrize("kind", ["ddpm++", "adm"])
@torch.no_grad()
def test_low_precision_ends_at_the_layers(kind: str) -> None:
    # At sigma = 0.002 the answer is the image itself: an image rounded to bfloat16 would be wrong by up to 0.004.
    x_t, sigma = tiny_edm.noisy((0.002, 0.002, 0.002))
    exact = network(kind)(x_t, sigma, condition(10))
    low = network(kind).cast_layers(torch.bfloat16)
    assert low.layer_dtype == torch.bfloat16
    assert {layer.weight.dtype for layer in low.modules() if isinstance(layer, nn.Linear)} == {torch.float32}
    difference = (low(x_t, sigma, condition(10)) - exact).abs().max()
    assert 0 < difference < 5e-4


def test_under_autocast_coefficients_stay_float32() -> None:
    x_t, sigma = tiny_edm.noisy((0.002, 0.002, 0.002))
    made = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x0 = made(x_t, sigma, condition(10))
    assert x0.dtype == torch.float32
    assert (x0 - made(x_t, sigma, condition(10))).abs().max() < 5e-4


@pytest.mark.parametrize("kind", ["ddpm++", "adm"])
def test_under_autocast_what_is_told_of_noise_and_class_is_the_same_to_the_last_bit(kind: str) -> None:
    made = network(kind)
    told: list[Tensor] = []
    layers = [layer for layer in made.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: told.append(output))
    exact = made(*tiny_edm.noisy(SIGMAS), condition(10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x0 = made(*tiny_edm.noisy(SIGMAS), condition(10))
    assert not torch.equal(x0, exact)  # the layers that see the image did run in bfloat16
    assert len(told) == 2 * len(layers)
    for low, high in zip(told[len(layers) :], told, strict=False):
        assert torch.equal(low, high)


@pytest.mark.parametrize("kind", ["ddpm++", "adm"])
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    def gradients(made: EdmNetwork) -> list[Tensor]:
        made(*tiny_edm.noisy(SIGMAS), condition(10)).square().mean().backward()
        return [parameter.grad for parameter in made.parameters()]

    plain, saving = network(kind), network(kind)
    saving.enable_gradient_checkpointing()
    for one, other in zip(gradients(plain), gradients(saving), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_company() -> None:
    made, (x_t, sigma) = network(), tiny_edm.noisy(SIGMAS)
    together = made(x_t, sigma, condition(10))
    for i in range(3):
        alone = made(x_t[i : i + 1], sigma[i], condition(10)[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=0)


def test_a_level_whose_channels_heads_cannot_divide_is_refused() -> None:
    with pytest.raises(UserError, match="there is no such network: 224 channels cannot be divided among 3 heads"):
        edm_network(tiny_edm.architecture("adm", 0, model_channels=224, channel_mult=(1, 1)))


def test_the_published_networks_have_as_many_weights_as_the_published_code_gives_them() -> None:
    sizes = {
        "cifar10": tiny_edm.architecture(
            img_resolution=32, model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,)
        ),
        "imagenet64": tiny_edm.architecture(
            "adm",
            1000,
            img_resolution=64,
            model_channels=192,
            channel_mult=(1, 2, 3, 4),
            num_blocks=3,
            attn_resolutions=(32, 16, 8),
        ),
    }
    with torch.device("meta"):
        counted = {name: sum(p.numel() for p in edm_network(a).parameters()) for name, a in sizes.items()}
    assert counted == {"cifar10": 55_734_147, "imagenet64": 295_899_267}
