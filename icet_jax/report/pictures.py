"""Saves small copies of the images that a report shows, so that the report needs no file outside the run directory."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from icet_jax.data.records import Example
from icet_jax.files import write_bytes_atomic
from icet_jax.media.images import open_image

PROMPTS_PER_DATASET = 16
LARGEST_SIDE = 256  # longer side of a picture in pixels

_T = TypeVar("_T")


def shown(rows: Sequence[_T]) -> list[_T]:
    """Returns the rows of a data set that the report shows: at most `PROMPTS_PER_DATASET`, evenly spaced."""
    count = min(len(rows), PROMPTS_PER_DATASET)
    return [rows[index * len(rows) // count] for index in range(count)]


def picture_path(run_dir: Path, dataset: str, row_id: str) -> Path:
    """Returns the file for the picture of a row. Its name is a hash, because row ids may contain any characters."""
    digest = hashlib.sha256(f"{dataset}\n{row_id}".encode("utf-8", "surrogatepass")).hexdigest()
    return run_dir / "transcripts" / "images" / f"{digest[:16]}.png"


def save_pictures(run_dir: Path, dataset: str, examples: Sequence[Example]) -> None:
    """Saves small copies of the images of the rows that the report will show.

    Several images of a row become one picture.

    Args:
      run_dir: the run directory.
      dataset: name of the data set, as in `transcripts/*.DATASET.jsonl`.
      examples: all rows of the data set, in the sweep's order.

    Raises:
      UserError: an image cannot be opened, or the folder cannot be written to.
    """
    from PIL import Image

    for example in shown(examples):
        path = picture_path(run_dir, dataset, example.id)
        if not example.images or path.exists():
            continue
        images = [open_image(image) for image in example.images]
        for image in images:
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
        left = 0
        for image in images:
            sheet.paste(image, (left, 0))
            left += image.width
        buffer = io.BytesIO()
        sheet.save(buffer, format="PNG", optimize=True)
        write_bytes_atomic(path, buffer.getvalue())
