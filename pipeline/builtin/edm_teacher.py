"""Make a small EDM teacher: a DDPM++ that denoises grey garments of 32 x 32, told their class or not.

    loss    mean of (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 |D(x0 + sigma eps, sigma, c) - x0|^2   (EDM Eq. 8)
    sigma   log(sigma) ~ N(log_sigma_mean, log_sigma_std^2), eps ~ N(0, I)                                 (EDM Table 1)

The convolution that ends a block, the one after its attention, and the network's last start near zero: at first every
block hands on what it gets, and the network says nothing about the image.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.builtin_schema import SmallEdmTeacherConfig
from pipeline.builtin.card import write_card
from pipeline.builtin.fit import fit
from pipeline.builtin.garments import GARMENTS, SIZE, Garments
from pipeline.builtin.randomness import generator
from pipeline.teachers.edm.architecture import WEIGHTS, EdmArchitecture, write_architecture
from pipeline.teachers.edm.networks import edm_network
from pipeline.teachers.edm.preconditioning import EdmNetwork

_TEST_IMAGES = 2000
_SMALL = 1e-5
"""Factor of the weights that start near zero, as DDPM++ has it."""
_ABOUT = """A miniature of the EDM teachers of CIFAR-10: a DDPM++ of the same parts, preconditioning and loss, on grey
garments of 32x32 pixels. It makes distillation from an EDM teacher something that can be tried."""
_DATA = """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, github.com/zalandoresearch/fashion-mnist, MIT licence,
copyright 2017 Zalando SE): grey garments on black, 28x28 with a margin of two pixels, as RGB. Trained on its 60,000
training images; the numbers below are of its 10,000 test images."""


def train_edm_teacher(config: SmallEdmTeacherConfig) -> Path:
    """Train what is not trained yet, and write the teacher and what its students are to be compared with.

    Returns:
        The teacher's folder, ``output/teacher``. Beside it is ``output/test_images``, see :func:`_write_test_images`.

    Raises:
        UserError: the data is missing, there is no network of so many channels, or a checkpoint is of another network,
            other settings or other data.
    """
    garments, test = (Garments(config.data, split, config.seed) for split in ("train", "test"))
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    architecture = EdmArchitecture(
        architecture="ddpm++",
        img_resolution=SIZE,
        label_dim=len(GARMENTS) if config.conditional else 0,
        **config.model_dump(include={"model_channels", "channel_mult", "num_blocks", "attn_resolutions"}),
    )
    network = _initial(architecture, config.seed).to(device)
    config.output.mkdir(parents=True, exist_ok=True)

    def loss(step: int) -> Tensor:
        images, classes = garments.untinted(step, config.fit.batch_size)
        return _loss(network, architecture, config, images, classes, generator(config.seed, "edm", step))

    settings = config.model_dump(mode="json", exclude={"output", "data", "device", "save_every_steps", "fit"})
    settings["data"] = garments.digest
    settings["test_data"] = test.digest  # test_images are of it
    fit(network, loss, config.fit, config.output / "edm.pt", config.save_every_steps, settings)
    metrics = {"loss": _test_loss(network, architecture, config, test)}
    folder = config.output / "teacher"
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_architecture(architecture, folder)
    size = sum(weight.numel() for weight in network.parameters())
    title = "A small EDM teacher"
    write_card(folder, title, _ABOUT, "train_edm_teacher.py", config, metrics, size=size, data=_DATA)
    _write_test_images(test, config.output / "test_images")
    print(json.dumps(metrics))
    return folder


def _write_test_images(test: Garments, folder: Path) -> None:
    """The test split as the teacher would draw it: ``folder/CLASS/NUMBER.png``, 32 x 32. It is there whole or not."""
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    images, classes = test.untinted(0, len(test))
    bytes_ = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for number, (image, class_) in enumerate(zip(bytes_, classes.tolist(), strict=True)):
        path = unfinished / str(class_) / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    os.replace(unfinished, folder)


def _initial(architecture: EdmArchitecture, seed: int) -> EdmNetwork:
    with torch.random.fork_rng(devices=[]):  # torch draws the first weights from the global generator
        torch.manual_seed(seed)
        network = edm_network(architecture)
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Conv2d) and name.rpartition(".")[2] in ("conv1", "proj", f"{SIZE}x{SIZE}_aux_conv"):
                layer.weight.mul_(_SMALL)
    return network


def _loss(
    network: EdmNetwork,
    architecture: EdmArchitecture,
    config: SmallEdmTeacherConfig,
    images: Tensor,
    classes: Tensor,
    draws: torch.Generator,
) -> Tensor:
    """The mean over a batch, each image at a noise level of its own."""
    device, data = next(network.parameters()).device, architecture.sigma_data
    sigma = (config.log_sigma_mean + config.log_sigma_std * torch.randn(len(images), generator=draws)).exp()
    eps = torch.randn(images.shape, generator=draws)
    x_t = images + sigma[:, None, None, None] * eps
    condition = torch.eye(architecture.label_dim)[classes] if architecture.label_dim else torch.zeros(len(images), 0)
    x0 = network(x_t.to(device), sigma.to(device), condition.to(device))
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    return (weight.to(device) * (x0 - images.to(device)).square().mean((1, 2, 3))).mean()


@torch.no_grad()
def _test_loss(
    network: EdmNetwork, architecture: EdmArchitecture, config: SmallEdmTeacherConfig, test: Garments
) -> float:
    """The loss on garments that were not trained on."""
    images, classes = test.untinted(0, min(_TEST_IMAGES, len(test)))
    return _loss(network, architecture, config, images, classes, generator(0, "try", 0)).item()
