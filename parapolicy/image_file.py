"""Decoding and encoding of JPEG and PNG files, as cameras and clients send them. Needs Pillow."""

import io
import warnings
from collections.abc import Collection

import numpy as np
from PIL import Image

from parapolicy.errors import ObservationError

MAX_PIXELS = 1 << 24  # 4096 × 4096
MAX_SCANS = 32  # of a JPEG; usual progressive ones have 10. A scan of a dozen bytes costs a pass over all pixels
_NAMES = {"L": "grey", "LA": "grey with alpha", "RGBA": "RGB with alpha", "P": "a palette"}
_START_OF_SCAN, _ORIENTATION, _UPRIGHT = b"\xff\xda", 0x0112, 1


def decode_image(data: bytes, modes: Collection[str], size: tuple[int, int] | None = None) -> np.ndarray:
    """Pixels (H, W, C) uint8 of a JPEG or PNG file. Size, mode and scans are checked before any pixel is decoded.

    Args:
        data: bytes of the file.
        modes: accepted modes, as Pillow names them: ``L`` (grey), ``RGB``, ``RGBA``.
        size: required (width, height); None: any, up to ``MAX_PIXELS``.

    Raises:
        ObservationError: not a whole JPEG or PNG, another mode or size, or an EXIF orientation.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large sizes, which are checked here
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                _check_header(image, data, modes, size)
                pixels = np.asarray(image)
                if (turned := image.getexif().get(_ORIENTATION, _UPRIGHT)) != _UPRIGHT:
                    raise ObservationError(f"the image has EXIF orientation {turned}; turn its pixels instead")
    except ObservationError:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        kind = f"{type(error).__name__}: {error!s:.100}"
        raise ObservationError(f"{len(data)} bytes are not a whole JPEG or PNG ({kind})") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def encode_image(pixels: np.ndarray, quality: int) -> bytes:
    """Encode an image (H, W, C) uint8 with one or three channels as JPEG, without colour subsampling."""
    file = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode an image (H, W, C) uint8 with one, three or four channels as PNG, fast rather than small."""
    file = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _check_header(image: Image.Image, data: bytes, modes: Collection[str], size: tuple[int, int] | None) -> None:
    if size is not None and image.size != size:
        raise ObservationError(f"the image is {image.width} × {image.height}, expected {size[0]} × {size[1]}")
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise ObservationError(f"the image is {image.width} × {image.height}, expected at most {MAX_PIXELS} pixels")
    if image.mode not in modes:
        given, expected = _NAMES.get(image.mode, image.mode), " or ".join(_NAMES.get(mode, mode) for mode in modes)
        raise ObservationError(f"the image's mode is {image.mode!r} ({given}), expected 8 bits of {expected}")
    if image.format != "PNG" and (scans := data.count(_START_OF_SCAN)) > MAX_SCANS:
        raise ObservationError(f"the JPEG has {scans} scans, expected at most {MAX_SCANS}; send a baseline JPEG")
