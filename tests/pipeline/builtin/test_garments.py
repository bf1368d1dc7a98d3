"""Garments are painted as the formula says, each once an epoch, the same at every reading."""

import gzip
from collections import Counter

import numpy as np
import pytest
import torch
from support.fashion import write_fashion, write_idx

from configs.errors import UserError
from pipeline.builtin.captions import COLOURS, GROUNDS
from pipeline.builtin.garments import JITTER, SHADE, Garments

IMAGES = "train-images-idx3-ubyte.gz"


def test_a_pixel_is_ground_where_the_garment_is_not_and_tint_where_it_is_brightest(tmp_path):
    write_fashion(tmp_path)
    grey = np.zeros((10, 28, 28), np.uint8)
    grey[:, 10:20, 10:20] = 255
    grey[:, 15, 15] = 102  # 0.4 of white: opaque, and shaded
    write_idx(tmp_path / IMAGES, grey)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(10, dtype=np.uint8))
    batch = Garments(tmp_path, "train", 3).batch(0, 10)
    pixels = (batch.images + 1) / 2
    for image, look in zip(pixels, batch.looks, strict=True):
        ground = torch.tensor(list(GROUNDS.values())[look.ground])
        colour = torch.tensor(list(COLOURS.values())[look.colour])
        torch.testing.assert_close(image[:, 0, 0], ground, atol=1e-6, rtol=0)
        tint = image[:, 13, 13]
        assert (tint - colour).abs().max() < 5 * JITTER
        torch.testing.assert_close(image[:, 17, 17], tint * (SHADE + (1 - SHADE) * 0.4), atol=1e-6, rtol=0)


def test_every_garment_comes_once_an_epoch_in_an_order_of_its_own(tmp_path):
    write_fashion(tmp_path)
    grey = np.zeros((64, 28, 28), np.uint8)
    for number in range(64):  # garment number as six bright or dark squares
        for bit in range(6):
            grey[number, 4 + 3 * bit : 6 + 3 * bit] = 255 * (number >> bit & 1)
    write_idx(tmp_path / IMAGES, grey)
    garments = Garments(tmp_path, "train", 0)

    def numbers(step):
        images = garments.batch(step, 16).images
        rows = torch.stack([images[:, :, 2 + 5 + 3 * bit, 16] for bit in range(6)], 1)
        differs = (rows - images[:, None, :, 0, 0]).abs().amax(-1) > 0.02
        return [sum(int(bit) << place for place, bit in enumerate(one)) for one in differs.tolist()]

    epochs = [[number for step in range(4 * epoch, 4 * epoch + 4) for number in numbers(step)] for epoch in range(3)]
    assert all(Counter(epoch) == Counter(range(64)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(64))


def test_a_batch_is_a_function_of_seed_split_and_step(fashion):
    first = Garments(fashion, "train", 5).batch(3, 16)
    again = Garments(fashion, "train", 5)
    again.batch(9, 16)
    torch.manual_seed(99)
    second = again.batch(3, 16)
    assert torch.equal(first.images, second.images)
    assert first.captions == second.captions
    assert Garments(fashion, "train", 6).batch(3, 16).captions != first.captions
    assert Garments(fashion, "test", 5).batch(1, 16).captions != Garments(fashion, "train", 5).batch(1, 16).captions


def test_a_batch_may_span_two_epochs(fashion):
    garments = Garments(fashion, "train", 0)
    across = [look.garment for look in garments.batch(1, 48).looks]  # places 48 to 96 of an endless row
    parts = [look.garment for step in (3, 4, 5) for look in garments.batch(step, 16).looks]
    assert across == parts


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be read"),
        (lambda path: path.write_bytes(b"not gzip at all"), "cannot be read"),
        (lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1])), "no file of"),
        (lambda path: path.write_bytes(gzip.compress(b"")), "no file of"),
        (lambda path: write_idx(path, np.zeros((64, 32, 32), np.uint8)), "no file of"),
        (lambda path: write_idx(path, np.zeros((63, 28, 28), np.uint8)), "63 images but 64 labels"),
    ],
)
def test_what_is_no_fashion_mnist_is_named(tmp_path, damage, message):
    damage(write_fashion(tmp_path) / IMAGES)
    with pytest.raises(UserError, match=message) as error:
        Garments(tmp_path, "train", 0)
    assert str(tmp_path) in str(error.value)


def test_a_label_beyond_the_classes_is_refused(tmp_path):
    write_idx(write_fashion(tmp_path) / "train-labels-idx1-ubyte.gz", np.full(64, 10, np.uint8))
    with pytest.raises(UserError, match="label 10"):
        Garments(tmp_path, "train", 0)
