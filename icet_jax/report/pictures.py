"""Saves small copies of the images of a data set's rows, so that the report needs no file outside the run directory."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from icet_jax.data.records import Example
from icet_jax.files import write_bytes_atomic
from icet_jax.media.images import open_image

MOST_PICTURES = 512  # most pictures of a data set
LARGEST_SIDE = 256  # longer side of a picture in pixels
MOST_IMAGES = 16  # most images of a row in its picture
SMALL_SIDE = 96  # a picture whose sides are no longer than this is a drawing, which lossy compression would blur
_QUALITY = 75  # of the lossy compression, 0 to 100

_T = TypeVar("_T")


def evenly_spaced(rows: Sequence[_T], most: int) -> list[_T]:
    """Returns at most `most` rows of a data set, evenly spaced; all rows if there are no more."""
    count = min(len(rows), most)
    return [rows[index * len(rows) // count] for index in range(count)]


def picture_path(run_dir: Path, dataset: str, row_id: str) -> Path:
    """Returns the file for the picture of a row. Its name is a hash, because row ids may contain any characters."""
    digest = hashlib.sha256(f"{dataset}\n{row_id}".encode("utf-8", "surrogatepass")).hexdigest()
    return run_dir / "transcripts" / "images" / f"{digest[:16]}.webp"


def save_pictures(run_dir: Path, dataset: str, examples: Sequence[Example]) -> None:
    """Saves small copies of the images of at most `MOST_PICTURES` rows, evenly spaced.

    The first `MOST_IMAGES` images of a row become one picture, side by side.

    Args:
      run_dir: the run directory.
      dataset: name of the data set, as in `transcripts/*.DATASET.jsonl`.
      examples: all rows of the data set, in the sweep's order.

    Raises:
      UserError: an image cannot be opened, or the folder cannot be written to.
    """
    from PIL import Image

    for example in evenly_spaced(examples, MOST_PICTURES):
        path = picture_path(run_dir, dataset, example.id)
        if not example.images or path.exists():
            continue
        images = [open_image(image) for image in example.images[:MOST_IMAGES]]
        for image in images:
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
        left = 0
        for image in images:
            sheet.paste(image, (left, 0))
            left += image.width
        buffer = io.BytesIO()
        sheet.save(buffer, format="WEBP", lossless=max(sheet.size) <= SMALL_SIDE, quality=_QUALITY)
        write_bytes_atomic(path, buffer.getvalue())
