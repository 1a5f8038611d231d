"""Pictures as the published scores saw them: 256 x 256 pixels, by way of JPEG.

The reference evaluation of BK-SDM (arXiv 2305.15798) saves what it generates as JPEG, shrinks real and generated
pictures alike with Pillow's `resize` and saves them as JPEG once more, always by Pillow's defaults. Both leave
traces in the features, so a score beside a published one needs the same.
"""

import io

from PIL import Image

from bksdm.runtime.rgb import as_rgb

_BY_DEFAULT = Image.Resampling.BICUBIC  # what `resize` takes when it is not told, for all modes but "1" and "P"


def prepare_generated(picture: Image.Image, size: int = 256) -> Image.Image:
    """A generated picture: written as JPEG, and then what becomes of a real one.

    Arguments:
        picture: As the model made it, RGB.
        size: Side of the result, in pixels.

    Returns:
        RGB, `size` x `size`.
    """
    return prepare_real(_through_jpeg(picture), size)


def prepare_real(picture: Image.Image, size: int = 256) -> Image.Image:
    """A real picture: resized, whatever its proportions, and written as JPEG.

    Arguments:
        picture: As its file has it: neither turned upright nor converted to RGB before, since the reference does
            not. Of a mode that JPEG has (RGB, L or CMYK); others become RGB, see `as_rgb`.
        size: Side of the result, in pixels.

    Returns:
        RGB, `size` x `size`.
    """
    as_jpeg_has_it = picture if picture.mode in {"RGB", "L", "CMYK"} else as_rgb(picture)
    return _through_jpeg(as_jpeg_has_it.resize((size, size), _BY_DEFAULT)).convert("RGB")


def _through_jpeg(picture: Image.Image) -> Image.Image:
    """The picture after writing and reading, by Pillow's defaults: quality 75, colours at half the resolution."""
    file = io.BytesIO()
    picture.save(file, format="JPEG")
    file.seek(0)
    with Image.open(file) as opened:
        opened.load()
        return opened.copy()
