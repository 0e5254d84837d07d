"""One image, from its stored bytes to pixels, by PIL: which files are images, and what they show."""

import io
import zlib

import numpy as np
from PIL import Image, ImageFilter, UnidentifiedImageError

from stopfast.config import Transforms
from stopfast.data.draws import Draws

_FORMATS = ("JPEG", "PNG")
_START_OF_SCAN = b"\xda"


def open_stored(data: bytes) -> Image.Image:
    """Read the header of a JPEG or PNG, whatever its file is called.

    Sizes and pixels are those stored: an EXIF orientation is never applied.

    Raises:
        ValueError: no JPEG or PNG, a damaged header, or more pixels than ``Image.MAX_IMAGE_PIXELS``.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError("neither JPEG nor PNG, or its header is damaged") from None
    except Exception as error:  # damaged headers raise whatever they make PIL stumble over
        raise ValueError(f"{type(error).__name__}: {error}") from None
    (width, height), limit = image.size, Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width}x{height} pixels, more than PIL's limit of {limit:,}")
    return image


def check_stored(data: bytes) -> None:
    """Decode an image whole, and check what makes DALI's stricter parsers fail where PIL goes on.

    Those are stray bytes between the segments of a JPEG's header, and a PNG without its end or with a wrong
    checksum.

    Raises:
        ValueError: why it cannot be used.
    """
    image = open_stored(data)
    try:
        # JPEGs are decoded at an eighth of their size: all of the stream is read, in less time.
        image.draft(None, (1, 1))
        image.load()
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if image.format == "PNG":
        _check_png(data)
    else:
        _check_jpeg_header(data)


def cut(image: Image.Image, draws: Draws, index: int, transforms: Transforms) -> np.ndarray:
    """Return a training image: cropped, resized, mirrored, grayed and blurred as drawn.

    The resize is PIL's antialiased one, of the crop alone, as torchvision's ``RandomResizedCrop`` does it;
    the grayscale is ITU-R 601; the radius of PIL's Gaussian blur is its standard deviation.

    Args:
        image: from :func:`open_stored`.
        draws: of a batch.
        index: which of the batch this image is.
        transforms: size of the result, and how it is resampled.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: it cannot be decoded.
    """
    (top, left), (height, width) = draws.top_left[index].tolist(), draws.size[index].tolist()
    try:
        image = to_rgb(image.crop((left, top, left + width, top + height)))
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    new_height, new_width = transforms.size
    resampling = Image.Resampling[transforms.interpolation.upper()]
    image = image.resize((new_width, new_height), resampling)
    if draws.flip[index]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draws.gray[index]:
        image = image.convert("L").convert("RGB")
    if draws.sigma[index] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(draws.sigma[index])))
    return np.asarray(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB: transparency is dropped, 16 bits are scaled to 8."""
    if image.mode.startswith("I"):  # 16-bit grayscale, which PIL would cut off at 255
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")


def _check_jpeg_header(data: bytes) -> None:
    """Walk the segments up to the first scan: each begins where the one before it ends."""
    place = 2
    while True:
        if data[place : place + 1] != b"\xff":
            raise ValueError(f"stray bytes between the segments of its header, at byte {place}")
        while data[place : place + 1] == b"\xff":
            place += 1
        if data[place : place + 1] == _START_OF_SCAN:
            return
        place += 1 + int.from_bytes(data[place + 1 : place + 3], "big")


def _check_png(data: bytes) -> None:
    """Walk the chunks to the end, which PIL does not ask for, nor for sums, once it has the pixels."""
    place = 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        kind = data[place + 4 : place + 8]
        if kind[:1].isupper():  # one that must not be ignored
            end = place + 8 + length
            if data[end : end + 4] != zlib.crc32(data[place + 4 : end]).to_bytes(4, "big"):
                raise ValueError("one of its chunks has a wrong checksum")
        if kind == b"IEND":
            return
        place += 12 + length
    raise ValueError("it ends before its IEND chunk")
