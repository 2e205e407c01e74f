"""Opens images (files, arrays, PIL images, ...) with the same pixels as transformers' processors would."""

import io
import re
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from icet_jax.errors import UserError
from icet_jax.files import LFS_ADVICE, is_lfs_pointer, require_regular


@runtime_checkable
class StoredImage(Protocol):
    """An image in a prepared data set, whose bytes are read when they are needed."""

    @property
    def name(self) -> str:
        """Returns the name of the image for error messages."""
        ...

    def read(self) -> bytes:
        """Returns the bytes of the image file."""
        ...


ImageLike: TypeAlias = str | PathLike[str] | bytes | Image.Image | np.ndarray | StoredImage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "ICO", "JPEG2000")
"""Formats that are opened. EPS is excluded because Pillow would start another program for it."""

MAX_PIXELS = 1 << 26
"""Largest number of pixels of a file, so that decoding, rotating and converting it takes less than 1 GiB."""

MAX_ASPECT_RATIO = 500
"""Largest ratio of the sides. An image is resized until its short side fits the model, so more could take gigabytes."""

_ADDRESS = re.compile(r"(https?|ftp|s3|gs|data):", re.IGNORECASE)
_SIZED_BY_HEADER = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112  # EXIF's tag for the orientation
_SIDEWAYS = (5, 6, 7, 8)  # values of this tag that exchange width and height
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def open_image(source: ImageLike, name: str | None = None) -> Image.Image:
    """Opens an image as 8-bit RGB, with the pixels that HF's processors get for the same object.

    A file (path or bytes) is rotated according to its EXIF tag and loses its alpha channel (HF's `load_image`). An
    image in memory is not rotated, and transparency is composited over white (HF's `convert_to_rgb`).

    Args:
      source: path, bytes of an image file, stored image, PIL image, or uint8 array (H, W), (H, W, C) or (C, H, W) with
        1, 3 or 4 channels. Only the first frame of an animation is used.
      name: name of the image in error messages; None for the path, or "image".

    Raises:
      UserError: the source is not an image, truncated, too large to be decoded safely, or an unsupported array.
    """
    if isinstance(source, (str, PathLike)):
        if _ADDRESS.match(str(source)):
            raise UserError(f"{name or source}: an address; images are files: download it, and give its path")
        return _decode(Path(source), name or str(source))
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), name or "image")
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "image")
    if isinstance(source, Image.Image):
        return _to_rgb(source, name or getattr(source, "filename", "") or "image")
    if isinstance(source, StoredImage):
        return _decode(io.BytesIO(source.read()), source.name)
    raise UserError(
        f"{name or 'image'}: {type(source).__name__} is not an image; give a path, bytes, PIL image or array"
    )


def image_size(source: ImageLike, name: str | None = None) -> tuple[int, int]:
    """Returns (height, width) of `open_image(source, name)`, without decoding pixels if the file's header is enough.

    Raises:
      UserError: see `open_image`; damaged pixels are noticed only if the header is not enough.
    """
    if isinstance(source, (str, PathLike)):
        file: Path | io.BytesIO = Path(source)
    elif isinstance(source, bytes):
        file = io.BytesIO(source)
    elif isinstance(source, Image.Image):
        return source.height, source.width
    elif isinstance(source, StoredImage):
        file = io.BytesIO(source.read())
    else:
        file = io.BytesIO()
    size = _header_size(file)
    if size is None:
        image = open_image(source, name)
        size = image.height, image.width
    return size


def _header_size(file: Path | io.BytesIO) -> tuple[int, int] | None:
    """Returns (height, width) after the EXIF rotation; None if that needs decoding, or if the file is damaged."""
    try:
        if isinstance(file, Path):
            require_regular(file)
        with Image.open(file, formats=_SIZED_BY_HEADER) as image:
            if image.format not in _SIZED_BY_HEADER or image.width * image.height > MAX_PIXELS:
                return None
            width, height = image.size
            if width == height:
                return height, width
            if image.format == "PNG" and "exif" not in image.info and _has_late_metadata(image):
                return None
            # The method of the base class, because PNG's decodes the image to find metadata after the pixels.
            is_sideways = Image.Image.getexif(image).get(_ORIENTATION, 1) in _SIDEWAYS
            return (width, height) if is_sideways else (height, width)
    # `open_image` will report what is wrong with the file.
    except Exception:
        return None


def _has_late_metadata(image: Any) -> bool:
    """Returns whether a PNG image that is not decoded yet has metadata after its pixels, where its rotation may be."""
    file = image.fp
    file.seek(len(_PNG_SIGNATURE))
    is_past_pixels = False
    # A PNG chunk is the length of its data (4 bytes), its type (4), the data and a checksum (4).
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        is_past_pixels = is_past_pixels or head[4:] == b"IDAT"
        if is_past_pixels and head[4:] in (b"eXIf", b"zTXt", b"iTXt", b"tEXt"):
            return True
        file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    return False


def require_resizable(image: Image.Image, name: str) -> None:
    """Raises a `UserError` if the sides of an image differ by more than `MAX_ASPECT_RATIO`."""
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise UserError(f"{name}: {image.width} x {image.height} pixels is too long and thin to be resized; crop it")


def _decode(file: Path | io.BytesIO, name: str) -> Image.Image:
    """Returns the RGB image of a file, rotated according to its EXIF tag."""
    if isinstance(file, Path):
        require_regular(file, name)
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such image file") from error
    except UnidentifiedImageError as error:
        if isinstance(file, Path) and is_lfs_pointer(file):
            raise UserError(f"{name}: {LFS_ADVICE}") from error
        raise UserError(f"{name}: not an image, or of a kind that Pillow cannot read") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: too large to be decoded safely ({error}); make it smaller first") from error
    except MemoryError as error:
        raise UserError(f"{name}: not enough memory to decode it; make it smaller first") from error
    # Pillow's decoders report damage in many ways (OSError, SyntaxError, struct.error, zlib.error, ...).
    except Exception as error:
        raise UserError(f"{name}: cannot be read, truncated or damaged ({error})") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Returns a PIL image as RGB, with transparency composited over white."""
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    # Pillow decodes a file when its pixels are first used, so its many kinds of errors can occur here.
    except Exception as error:
        raise UserError(f"{name}: cannot be read, truncated or damaged ({error})") from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """Returns the RGB image of a uint8 array, with transparency composited over white."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.size == 0:
        raise UserError(f"{name}: an array of {array.dtype} and shape {array.shape} is no image; give uint8 (H, W, 3)")
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.shape[0] in (1, 3, 4):
        # If both the first and the last axis could be channels, it is the first, as in HF.
        array = np.moveaxis(array, 0, -1)
    channels = array.shape[-1]
    if channels not in (1, 3, 4):
        raise UserError(
            f"{name}: an image array has 1, 3 or 4 channels, first or last; this one's shape is {array.shape}"
        )
    if channels == 1:
        array = np.repeat(array, 3, axis=-1)
    if channels == 4:
        alpha = array[..., 3:] / 255
        array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))
