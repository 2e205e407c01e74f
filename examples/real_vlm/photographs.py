"""Reads photographs with captions, and objects in photographs, from files in MS-COCO's layout."""

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icet_jax.errors import UserError
from icet_jax.files import JsonObject, parse_json, read_bytes
from icet_jax.media.image_files import ImageFiles, leaves_root

LEAST = 10
"""Fewest photographs of which a model can be built: two of them are held out."""

HELD_OUT_SHARE = 0.2
"""Share of the photographs that no training sees."""

_SHOWN = 3  # problems that are printed


@dataclass(frozen=True)
class Photograph:
    """Holds one photograph.

    Attributes:
      name: path of its file in the folder of photographs, as the captions file has it.
      path: path of its file.
      captions: its captions, at least one.
    """

    name: str
    path: Path
    captions: tuple[str, ...]

    @property
    def is_held_out(self) -> bool:
        """Returns whether no training may see the photograph."""
        return is_held_out(self.name, HELD_OUT_SHARE)


def is_held_out(key: str, share: float) -> bool:
    """Returns whether what `key` names is held out; a pure function of the text, true for `share` of all texts.

    White space and case do not count, so that a prompt that a file has twice is on one side.
    """
    digest = hashlib.sha256(" ".join(key.casefold().split()).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def hash_order(key: str) -> bytes:
    """Returns a key for sorting texts in an order that looks random and is the same everywhere."""
    return hashlib.sha256(b"order\n" + key.encode("utf-8", "surrogatepass")).digest()


def read_photographs(captions: Path, images: Path) -> list[Photograph]:
    """Returns the usable photographs of a captions file, sorted by name; names the others on standard error.

    Args:
      captions: file with MS-COCO's lists `images` (id, file_name) and `annotations` (image_id, caption).
      images: folder of the photographs.

    Raises:
      UserError: the file or the folder cannot be read, or too few photographs are usable.
    """
    content = read_coco(captions, "--captions", ("images", "annotations"))
    texts = defaultdict(list)
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and isinstance(annotation.get("caption"), str):
            caption = tidy(annotation["caption"])
            if caption and "<" not in caption:  # a placeholder such as <image> is no word of a caption
                texts[annotation.get("image_id")].append(caption)
    photographs, problems = [], Counter[str]()
    check = _file_check(images)
    names = {}
    for image in content["images"]:
        if isinstance(image, dict) and isinstance(image.get("file_name"), str):
            names[image["file_name"]] = tuple(texts.get(image.get("id"), ()))
    for name, photograph_captions in sorted(names.items()):
        problem = check(name) if photograph_captions else f"{name}: has no caption"
        if problem is None:
            photographs.append(Photograph(name, images / name, photograph_captions))
        else:
            problems[problem] += 1
    for problem in list(problems)[:_SHOWN]:
        print(f"real_vlm: left out: {problem}", file=sys.stderr)
    if len(problems) > _SHOWN:
        print(f"real_vlm: left out: {len(problems) - _SHOWN} more photographs", file=sys.stderr)
    held_out = sum(photograph.is_held_out for photograph in photographs)
    if len(photographs) < LEAST or held_out < 2 or len(photographs) - held_out < 2:
        first = f"; the first problem: {next(iter(problems))}" if problems else ""
        raise UserError(
            f"{captions}: only {len(photographs)} photographs with captions are usable, {held_out} of them held out; "
            f"give at least {LEAST}{first}"
        )
    return photographs


def read_coco(path: Path, option: str, lists: tuple[str, ...]) -> JsonObject:
    """Returns the content of a file in MS-COCO's layout.

    Args:
      path: the file.
      option: option of the command line that names it, for error messages.
      lists: names of the lists that it must contain.

    Raises:
      UserError: the file does not exist or is not in that layout.
    """
    if not path.is_file():
        raise UserError(f"{option}={path}: no such file; give a JSON file in MS-COCO's layout")
    try:
        content = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{option}={path}: not a JSON file ({error}); give one in MS-COCO's layout") from error
    for name in lists:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(
                f"{option}={path}: has no list '{name}'; MS-COCO's layout has {', '.join(lists)} "
                "(examples/real_vlm/flickr8k.py makes it of Flickr8k's captions.txt)"
            )
    return dict(content)


def read_objects(instances: Path) -> dict[str, Counter[str]]:
    """Returns {file name: number of objects of each category, 0 for those that are absent} of an instances file.

    Photographs with a crowd are left out, because a crowd is not counted.

    Raises:
      UserError: the file does not exist or is not in MS-COCO's layout.
    """
    content = read_coco(instances, "--instances", ("images", "annotations", "categories"))
    names = {image.get("id"): str(image.get("file_name")) for image in content["images"] if isinstance(image, dict)}
    categories = {row.get("id"): str(row.get("name")) for row in content["categories"] if isinstance(row, dict)}
    counts: dict[str, Counter[str]] = {name: Counter(dict.fromkeys(categories.values(), 0)) for name in names.values()}
    for row in content["annotations"]:
        if not isinstance(row, dict) or row.get("image_id") not in names:
            continue
        name, category = names[row["image_id"]], categories.get(row.get("category_id"))
        if row.get("iscrowd"):
            counts.pop(name, None)
        elif name in counts and category is not None:
            counts[name][category] += 1
    return counts


def tidy(caption: str) -> str:
    """Returns a caption as one sentence: no space before its stops, a capital first, a full stop last."""
    text = " ".join(caption.split())
    for mark in (".", ",", "!", "?", ";"):
        text = text.replace(f" {mark}", mark)
    text = text.strip(" .\"'")
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _file_check(images: Path) -> Callable[[str], str | None]:
    """Returns a function that says what is wrong with the photograph of a name; None if it is usable.

    Raises:
      UserError: there is no such folder.
    """
    if not images.is_dir():
        raise UserError(f"--images={images}: no such folder; give the folder of the photographs")
    files: Any = ImageFiles()

    def check(name: str) -> str | None:
        if leaves_root(images, name):
            return f"{name}: is not in {images}"
        problem = files.problem(images / name)
        return None if problem is None else f"{name}: {problem[1]}"

    return check
