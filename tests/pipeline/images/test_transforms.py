"""What each way of resizing does to an image."""

import io

import numpy as np
import pytest
from PIL import Image
from support.pictures import pictures
from support.real_images import png

from pipeline.images import transforms
from pipeline.images.transforms import BadImage, to_image


def ramp(height, width):
    """Red grows to the right, green downwards, by one level a pixel."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(width), np.arange(height)[:, None]
    return image


def test_none_keeps_every_pixel_and_refuses_another_size():
    image = pictures(1, 16, 16)[0]
    np.testing.assert_array_equal(to_image(png(image), 16, "none"), image)
    with pytest.raises(BadImage, match="has a wrong shape"):
        to_image(png(image), 8, "none")


@pytest.mark.parametrize("resize", ["scale", "center_crop", "center_crop_dhariwal"])
def test_an_image_of_the_right_size_is_kept(resize):
    image = pictures(1, 16, 16)[0]
    np.testing.assert_array_equal(to_image(png(image), 16, resize), image)


@pytest.mark.parametrize("resize", ["center_crop", "center_crop_dhariwal"])
@pytest.mark.parametrize("shape", [(32, 50), (50, 32)])
def test_the_middle_is_what_is_left(resize, shape):
    middle = to_image(png(ramp(*shape)), 8, resize).astype(float).mean((0, 1))
    np.testing.assert_allclose(middle[:2], [(shape[1] - 1) / 2, (shape[0] - 1) / 2], atol=1)


def test_scale_keeps_the_edges_and_a_crop_does_not():
    wide = ramp(16, 128)
    scaled, cropped = to_image(png(wide), 16, "scale"), to_image(png(wide), 16, "center_crop")
    assert scaled[..., 0].max() - scaled[..., 0].min() > 110
    np.testing.assert_array_equal(cropped, wide[:, 56:72])


def test_halving_is_the_mean_of_four():
    image = pictures(1, 32, 32)[0]
    means = image.reshape(16, 2, 16, 2, 3).astype(float).mean((1, 3))
    assert np.abs(to_image(png(image), 16, "center_crop_dhariwal") - means).max() <= 1  # rounded twice


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_whatever_the_colours_three_come_out(mode):
    buffer = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(buffer, "PNG")
    else:
        Image.new("RGB", (16, 16), (10, 200, 30)).convert(mode).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    assert to_image(buffer.getvalue(), 16, "none").shape == (16, 16, 3)


@pytest.mark.parametrize("shape", [(30_000, 4), (4, 30_000)])
def test_a_strip_is_not_scaled_to_gigabytes(shape):
    strip = png(np.zeros((*shape, 3), np.uint8))
    with pytest.raises(BadImage, match="is so long and narrow that scaling it takes more than 67,108,864 pixels"):
        to_image(strip, 128, "center_crop_dhariwal")  # to 128 x 960,000, and then to its middle
    assert to_image(strip, 128, "center_crop").shape == (128, 128, 3)


@pytest.mark.parametrize(
    ("resize", "shape", "pixels"),
    [
        ("center_crop_dhariwal", (100, 4), 200 * 8),
        ("center_crop_dhariwal", (4, 100), 200 * 8),
        ("scale", (1000, 1), 1000 * 8),  # the new width and the old height, before the height is changed too
    ],
)
def test_the_largest_picture_on_the_way_decides(resize, shape, pixels, monkeypatch):
    strip = png(pictures(1, *shape)[0])
    expected = to_image(strip, 8, resize)
    monkeypatch.setattr(transforms, "MAX_PIXELS", pixels)
    np.testing.assert_array_equal(to_image(strip, 8, resize), expected)
    monkeypatch.setattr(transforms, "MAX_PIXELS", pixels - 1)
    with pytest.raises(BadImage, match=f"long and narrow that scaling it takes more than {pixels - 1:,} pixels"):
        to_image(strip, 8, resize)
