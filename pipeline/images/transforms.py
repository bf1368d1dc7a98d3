"""From an image file to an RGB image of one size. Nothing is random.

    none                  as it is; any other size is refused
    scale                 Lanczos, whatever the shape
    center_crop           the largest middle square, then Lanczos: what EDM's dataset tool calls center-crop
    center_crop_dhariwal  halved by boxes while the shorter side is at least twice the size, then bicubic until it is
                          the size, then the middle square: what ADM did to ImageNet (Dhariwal and Nichol 2021)

Pillow does the resizing, in 8 bits. Colours become RGB by Pillow's rules: grey is repeated, transparency dropped. Files
that say how to turn them (EXIF) are not turned; no dataset tool or FID code does that.

Bounded is not only what a file holds, but also what it is scaled to: ADM's recipe makes a strip of 4 x 30,000 pixels
one of 512 x 3,840,000 before it takes the middle.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from configs.encode_schema import Resize

MAX_PIXELS = 1 << 26
"""An image of more, or scaled through more, is rejected. Pillow takes 4 bytes a pixel, so these are 256 MiB, and holds
up to three such images at a time: the old, the new, and between them one of the new width and the old height."""
MAX_SIDE = 1 << 20
"""A longer image is rejected: Pillow's tables of weights take up to 48 bytes for each pixel of a side."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


class BadImage(ValueError):
    """An image that cannot be stored; the message is the reason."""


def to_image(data: bytes, size: int, resize: Resize) -> NDArray[np.uint8]:
    """Decode an image file and bring it to its size.

    Args:
        data: the file.
        size: height and width, in pixels.
        resize: how.

    Returns:
        (size, size, 3), uint8, red green blue.

    Raises:
        BadImage: it is no image, damaged, too large or too long, before it is scaled or after, or with ``none`` of
            another size.
    """
    image = _decoded(data)
    match resize:
        case "none":
            if image.size != (size, size):
                raise BadImage("has a wrong shape")
        case "scale":
            image = _scaled(image, size, size, Image.Resampling.LANCZOS)
        case "center_crop":
            image = _middle(image, min(image.size)).resize((size, size), Image.Resampling.LANCZOS)
        case "center_crop_dhariwal":
            while min(image.size) >= 2 * size:
                image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
            scale = size / min(image.size)
            width, height = round(image.width * scale), round(image.height * scale)
            image = _middle(_scaled(image, width, height, Image.Resampling.BICUBIC), size)
    return np.asarray(image)


def _decoded(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise BadImage(f"has more than {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError):
        raise BadImage("is no png, jpeg, webp or bmp") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"has more than {MAX_PIXELS:,} pixels")
    if max(image.size) > MAX_SIDE:
        raise BadImage(f"has a side of more than {MAX_SIDE:,} pixels")
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # bytes in memory: nothing but damage is left
        raise BadImage("is cut short or damaged") from None


def _scaled(image: Image.Image, width: int, height: int, by: Image.Resampling) -> Image.Image:
    if width * max(height, image.height) > MAX_PIXELS:  # Pillow changes the width first
        raise BadImage(f"is so long and narrow that scaling it takes more than {MAX_PIXELS:,} pixels")
    return image.resize((width, height), by)


def _middle(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
