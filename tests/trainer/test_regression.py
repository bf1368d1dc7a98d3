"""The distance between student and teacher on a pair; LPIPS with a VGG16 of random numbers under torch.hub's name."""

import hashlib
import math
import urllib.error
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.train_schema import LossConfig
from trainer import perceptual
from trainer.regression import build_regression, check_regression, resize

CPU = torch.device("cpu")
LATENT_L2 = LossConfig(regression="l2", regression_space="latent")
PIXEL_L2 = LossConfig(regression="l2")


@pytest.fixture
def samples() -> tuple[Tensor, Tensor]:
    """Two batches that reach beyond [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 3, 20, 20, generator=generator)
    return x, y


def double_size(x0: Tensor) -> Tensor:
    """Stands for a decoder: another size, not linear, and far out of [-1, 1]."""
    return nn.functional.interpolate(x0, scale_factor=2, mode="nearest").sinh()


# ------------------------------------------------------------------------------------------------- l2, pseudo_huber


def test_l2_is_the_mean_squared_error_of_each_sample(samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    losses = build_regression(LATENT_L2, None, CPU)(x, y)
    expected = torch.stack([nn.functional.mse_loss(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_pseudo_huber_is_the_papers_over_the_root_of_the_dimension(
    samples: tuple[Tensor, Tensor], scale: float
) -> None:
    x, y = samples
    loss = LossConfig(regression="pseudo_huber", regression_space="latent")
    losses = build_regression(loss, None, CPU)(y + scale * x, y)
    dimension = 3 * 20 * 20
    c = 0.00054 * math.sqrt(dimension)
    squared_norm = ((y + scale * x) - y).double().square().flatten(1).sum(1)
    expected = ((squared_norm + c**2).sqrt() - c) / math.sqrt(dimension)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-10)


def test_at_zero_distance_loss_and_gradient_are_zero(samples: tuple[Tensor, Tensor]) -> None:
    for name in ("l2", "pseudo_huber"):
        x = samples[0].clone().requires_grad_()
        losses = build_regression(LossConfig(regression=name, regression_space="latent"), None, CPU)(x, samples[0])
        losses.sum().backward()
        assert losses.eq(0).all()
        assert x.grad is not None
        assert x.grad.eq(0).all()


def test_a_target_is_widened_before_anything_is_done_with_it(samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    regression = build_regression(PIXEL_L2, double_size, CPU)
    assert torch.equal(regression(x, y.half()), regression(x, y.half().float()))


# ------------------------------------------------------------------------------------ which space, whose gradient


def test_pixel_space_decodes_both_sides_and_latent_space_neither(samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    plain = build_regression(LATENT_L2, None, CPU)
    assert torch.equal(build_regression(LATENT_L2, double_size, CPU)(x, y), plain(x, y))
    assert torch.equal(build_regression(PIXEL_L2, double_size, CPU)(x, y), plain(double_size(x), double_size(y)))


def test_an_image_is_compared_as_it_is(samples: tuple[Tensor, Tensor]) -> None:
    x, image = samples[0], double_size(samples[1])
    regression = build_regression(PIXEL_L2, double_size, CPU, target="image")
    assert torch.equal(regression(x, image), build_regression(LATENT_L2, None, CPU)(double_size(x), image))


def test_an_image_is_no_latent() -> None:
    with pytest.raises(ValueError, match="latent"):
        build_regression(LATENT_L2, double_size, CPU, target="image")


def test_the_gradient_reaches_the_student_alone(samples: tuple[Tensor, Tensor]) -> None:
    x, y = (tensor.clone().requires_grad_() for tensor in samples)
    build_regression(PIXEL_L2, double_size, CPU)(x, y).sum().backward()
    assert x.grad is not None
    assert x.grad.ne(0).all()
    assert y.grad is None


def test_autocast_around_it_changes_nothing(samples: tuple[Tensor, Tensor]) -> None:
    weight = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    regression = build_regression(PIXEL_L2, lambda x0: nn.functional.conv2d(x0, weight), CPU)
    plain = regression(*samples)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(regression(*samples), plain)


# ----------------------------------------------------------------------------------------------------------- lpips


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch home with the layers of VGG16 that LPIPS uses, random, under a name that begins their sha256."""
    generator = torch.Generator().manual_seed(2)
    weights, channels = {}, 3
    layers = [64, 64, "pool", 128, 128, "pool", *[256] * 3, "pool", *[512] * 3, "pool", *[512] * 3]
    number = 0
    for layer in layers:
        if isinstance(layer, int):
            std = math.sqrt(2 / (9 * channels))
            weights[f"features.{number}.weight"] = std * torch.randn(layer, channels, 3, 3, generator=generator)
            weights[f"features.{number}.bias"] = torch.zeros(layer)
            channels = layer
        number += 1 if layer == "pool" else 2
    home = tmp_path_factory.mktemp("torch_home")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(weights, folder / "weights")
    digest = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()
    return (folder / "weights").rename(folder / f"vgg16-{digest[:8]}.pth")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, vgg16: Path) -> Iterator[None]:
    """Have torch.hub's folder be that one, and nothing ask for the network."""

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(vgg16.parents[2]))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(perceptual, "VGG16_URL", f"https://weights.invalid/{vgg16.name}")
    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def reference(vgg16: Path) -> nn.Module:
    """The lpips package's own metric, VGG16's weights put into it one by one."""
    import lpips

    with torch.random.fork_rng(devices=[]):
        metric = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    weights = torch.load(vgg16, weights_only=True)
    for part in (metric.net.slice1, metric.net.slice2, metric.net.slice3, metric.net.slice4, metric.net.slice5):
        for number, layer in part.named_children():
            if isinstance(layer, nn.Conv2d):
                layer.load_state_dict({kind: weights[f"features.{number}.{kind}"] for kind in ("weight", "bias")})
    return metric


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize(("resolution", "size"), [(None, 224), (64, 64), (16, 16)])
def test_lpips_is_the_packages(
    samples: tuple[Tensor, Tensor], reference: nn.Module, resolution: int | None, size: int
) -> None:
    """Of the decoded images, enlarged to 224 or to what is asked for; with autocast around it too."""
    x, y = (sample[:1] if resolution is None else sample for sample in samples)
    images = [
        nn.functional.interpolate(double_size(i), size=(size, size), mode="bilinear", align_corners=False)
        for i in (x, y)
    ]
    with torch.no_grad():
        expected = reference(*images).flatten()
        with torch.autocast("cpu", torch.bfloat16):
            losses = build_regression(LossConfig(lpips_resolution=resolution), double_size, CPU)(x, y)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("use")
def test_lpips_does_not_clip_and_has_the_packages_gradient(
    samples: tuple[Tensor, Tensor], reference: nn.Module
) -> None:
    x, y = (3 * sample for sample in samples)
    ours, theirs, target = x.clone().requires_grad_(), x.clone().requires_grad_(), y.clone().requires_grad_()
    build_regression(LossConfig(lpips_resolution=20), None, CPU)(ours, target).sum().backward()
    reference(theirs, y).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert target.grad is None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-9)
    assert ours.grad[x.abs() > 1].ne(0).any()


@pytest.mark.usefixtures("use")
def test_lpips_is_frozen_whatever_becomes_of_the_trainers_mode() -> None:
    metric = perceptual.load_lpips(CPU)
    network = metric.__closure__[0].cell_contents  # type: ignore[index]
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.usefixtures("use")
def test_an_image_without_any_feature_has_a_finite_gradient() -> None:
    """The mean image: every activation is zero, and so is the norm that LPIPS divides by the root of."""
    mean = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1).expand(1, 3, 32, 32).clone().requires_grad_()
    target = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    build_regression(LossConfig(lpips_resolution=32), None, CPU)(mean, target).sum().backward()
    assert mean.grad is not None
    assert mean.grad.isfinite().all()


def test_resize_enlarges_small_images_and_leaves_large_ones() -> None:
    for height, width, expected in ((64, 64, (224, 224)), (256, 128, (224, 224)), (224, 256, (224, 256))):
        assert resize(torch.zeros(1, 3, height, width), None).shape[-2:] == expected
    assert resize(torch.zeros(1, 3, 512, 512), 256).shape[-2:] == (256, 256)
    # Every second pixel average, not a wider filter: no antialiasing, corners not aligned.
    image = torch.arange(16.0).view(1, 1, 4, 4)
    torch.testing.assert_close(resize(image, 2), nn.functional.avg_pool2d(image, 2))


# ----------------------------------------------------------------------------------------- weights that are not there


@pytest.mark.usefixtures("use")
def test_missing_weights_are_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as caught:
        check_regression(LossConfig())
    line = str(caught.value)
    name = perceptual.VGG16_URL.rpartition("/")[2]
    for part in (str(tmp_path / "hub" / "checkpoints" / name), perceptual.VGG16_URL, "no route to host", "l2"):
        assert part in line
    assert "\n" not in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real connection to a server that accepts and never answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(perceptual, "VGG16_URL", f"http://127.0.0.1:{port}/vgg16-00000000.pth")
        monkeypatch.setattr(perceptual, "SILENCE_S", 0.2)
        with pytest.raises(UserError, match="timed out"):
            check_regression(LossConfig())
    assert socket.getdefaulttimeout() is None


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_damaged_weights_are_refused(tmp_path: Path, vgg16: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    content = bytearray(vgg16.read_bytes())
    content[len(content) // 2] ^= 1
    copy = tmp_path / "hub" / "checkpoints" / vgg16.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes({"flipped": content, "short": content[:-100], "empty": b""}[damage])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="damaged") as caught:
        check_regression(LossConfig())
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("use")
def test_only_lpips_asks_for_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    check_regression(LossConfig(regression="l2"))
    check_regression(LossConfig(regression_weight=0))
    build_regression(LossConfig(regression="pseudo_huber"), None, CPU)


@pytest.mark.parametrize("target", ["x0", "image"])
def test_a_target_comes_to_the_device_of_the_students_sample(target, monkeypatch):
    # Pairs are read on the CPU; a sample on the meta device meets a tensor of no other. It knows no autocast.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    loss = LossConfig(regression="l2", regression_space="pixels")
    regression = build_regression(loss, lambda x0: 2 * x0, torch.device("meta"), target)
    distance = regression(torch.empty(2, 3, 4, 4, device="meta"), torch.zeros(2, 3, 4, 4, dtype=torch.float16))
    assert (distance.device.type, distance.dtype) == ("meta", torch.float32)
