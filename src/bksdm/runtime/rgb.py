"""Pictures of any mode as RGB."""

import numpy as np
from PIL import Image

from bksdm.common.errors import InputError

_LEVELS = 65535


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture as RGB: 16 bits of grey rounded to 8, transparency on white.

    Raises:
        InputError: Its numbers do not say what white is.
    """
    if image.mode == "F":
        raise InputError("its colours are floating-point numbers, of which none is white; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode == "P" or image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow's own conversion would cut off above 255."""
    levels = np.asarray(image).astype(np.int64)
    if levels.size and not 0 <= levels.min() <= levels.max() <= _LEVELS:
        raise InputError(f"its greys go from {levels.min()} to {levels.max()}; save it with 8 or 16 bits")
    clear = levels == image.info.get("transparency", -1)
    return Image.fromarray(np.where(clear, 255, (levels + 128) // 257).astype(np.uint8))
