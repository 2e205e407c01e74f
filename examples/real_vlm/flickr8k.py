"""Converts Flickr8k's captions.txt (columns image, caption) to MS-COCO's layout, which build.py reads.

    python examples/real_vlm/flickr8k.py captions.txt captions.json

With `--images DIR` only photographs that are in that folder are kept.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from icet_jax.errors import UserError  # noqa: E402
from icet_jax.files import JsonObject, write_text_atomic  # noqa: E402


def to_coco(captions: Path, images: Path | None = None) -> JsonObject:
    """Returns the content of a captions file in MS-COCO's layout.

    Args:
      captions: CSV file with the columns image and caption; a photograph has several rows.
      images: folder whose photographs are kept; None keeps all.

    Raises:
      UserError: the file cannot be read, has other columns, or no row is kept.
    """
    try:
        with captions.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if not {"image", "caption"} <= set(reader.fieldnames or ()):
                raise UserError(f"{captions}: the first line must name the columns image,caption")
            rows = [(row["image"], row["caption"]) for row in reader if row["image"] and row["caption"]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{captions}: cannot be read ({error}); give Flickr8k's captions.txt") from error
    kept = [row for row in rows if images is None or (images / row[0]).is_file()]
    if not kept:
        raise UserError(f"{captions}: none of its {len(rows)} rows is about a photograph in {images}")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in kept), start=1)}
    annotations = [
        {"id": number, "image_id": numbers[name], "caption": caption}
        for number, (name, caption) in enumerate(kept, start=1)
    ]
    return {
        "images": [{"id": number, "file_name": name} for name, number in numbers.items()],
        "annotations": annotations,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts the file that the command line names, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path, help="Flickr8k's captions.txt")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--images", type=Path, help="folder of the photographs")
    options = parser.parse_args(arguments)
    try:
        content = to_coco(options.captions, options.images)
        write_text_atomic(options.out, json.dumps(content, indent=1) + "\n")
    except UserError as error:
        print(f"real_vlm: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.out}: {len(content['images'])} photographs, {len(content['annotations'])} captions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
