"""Pictures as a viewer shows them, from whatever holds one: a file, its bytes, a PIL picture, an
array."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

#: what PIL raises for files that are no pictures, or broken ones
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
)
SOURCES = "a file, its bytes, a PIL picture, or an array (height, width, 3) of 0 … 255"


def read_image(source: Any) -> Image:
    """A picture in RGB, upright: turned as its EXIF orientation says.

    That is how viewers and `transformers.image_utils.load_image` show it.
    Of an animated file the first frame; 16 bits a channel are scaled to 8. Colours under a
    transparent part are what models of transformers read; where a viewer would show something else
    there, a warning says so.

    Args:
        source: a file, its bytes or an open file, a PIL picture, or an array or tensor (height,
            width), (height, width, channels) or (channels, height, width), of bytes or of floats
            from 0 to 1.

    Raises:
        InputError: it is missing or no picture.

    Example:
        >>> from PIL import Image
        >>> Image.new("L", (8, 4)).save("grey.png")
        >>> picture = interp.vision.read_image("grey.png")
        >>> picture.mode, picture.size
        ('RGB', (8, 4))
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _upright(source, "This picture")
    if isinstance(source, (str, Path)):
        return _read(source, str(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(io.BytesIO(bytes(source)), f"These {len(source)} bytes")
    if hasattr(source, "read"):
        return _read(source, f"The open file {getattr(source, 'name', '')}".rstrip())
    if hasattr(source, "shape"):
        return _of_array(source)
    raise InputError(f"A picture is {SOURCES}, not a {type(source).__name__}.")


def _read(file: Any, what: str) -> Image:
    from PIL import Image

    if what.startswith(("http://", "https://", "data:")):
        raise InputError(
            f"{what[:60]} is an address, and pictures are read from files; download it first."
        )
    try:
        with Image.open(file) as picture:
            return _upright(picture, what)
    except FileNotFoundError as error:
        raise InputError(f"There is no image {what}.") from error
    except (*BROKEN, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{what} can't be read as an image ({type(error).__name__}); PNG and JPEG files can."
        ) from error


def _upright(picture: Image, what: str) -> Image:
    """The picture in RGB, turned as its EXIF says."""
    from PIL import ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.width < 1 or picture.height < 1:
        raise InputError(f"{what} has no pixels: it is {picture.width} × {picture.height}.")
    if picture.mode.startswith(("I", "F")):
        return _deep(picture, what)
    plain = picture.convert("RGB")
    if picture.has_transparency_data:
        _warn_of_transparency(picture, plain, what)
    return plain


def _deep(picture: Image, what: str) -> Image:
    """Of more than 8 bits: 16 are scaled; other numbers must be bytes. (PIL's own conversion turns
    all that is above 255 white.)"""
    from PIL import Image

    values = np.asarray(picture)
    if picture.mode.startswith("I;16"):
        return Image.fromarray((values.astype(np.float64) / 257).round().astype(np.uint8)).convert(
            "RGB"
        )
    if values.min() < 0 or values.max() > 255 or not np.isfinite(values).all():
        raise InputError(
            f"{what} has pixels from {values.min():g} to {values.max():g} (mode {picture.mode}), "
            "and which are black and white is not said; scale them to 0 … 255."
        )
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


def _warn_of_transparency(picture: Image, plain: Image, what: str) -> None:
    """A word where the picture looks otherwise on white, as viewers show it."""
    from PIL import Image

    layers = picture.convert("RGBA")
    white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
    shown = np.asarray(Image.alpha_composite(white, layers).convert("RGB"), dtype=np.int16)
    if int(np.abs(shown - np.asarray(plain, dtype=np.int16)).max()) > 8:
        warnings.warn(
            f"{what} has transparent parts, under which models read other colours than a viewer "
            "shows; lay it on a background first if that matters.",
            UserWarning,
            stacklevel=4,
        )


def _of_array(array: Any) -> Image:
    from PIL import Image

    values = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
    shape = values.shape
    if values.ndim == 3 and shape[-1] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] in (3, 4))) or 0 in shape:
        raise InputError(f"A picture is {SOURCES}, not an array of shape {tuple(shape)}.")
    if values.dtype == bool:
        values = values * np.uint8(255)
    if values.dtype != np.uint8:
        values = _as_bytes(values)
    return _upright(Image.fromarray(np.ascontiguousarray(values)), "This array")


def _as_bytes(values: np.ndarray) -> np.ndarray:
    """Floats from 0 to 1, or numbers from 0 to 255, as bytes."""
    kind = values.dtype.kind
    low, high = (float(values.min()), float(values.max())) if kind in "iuf" else (np.nan, np.nan)
    most = 1.0 if kind == "f" and high <= 1 else 255.0
    if not (low >= 0 and high <= most):  # NaN too
        raise InputError(
            f"A picture's numbers are from 0 to 255, or floats from 0 to 1; this array's are "
            f"{values.dtype} from {low:g} to {high:g}."
        )
    return np.asarray((values * (255 / most)).round(), dtype=np.uint8)
