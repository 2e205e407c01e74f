"""Checks the image files that rows name, and chooses an image for rows that have none."""

import hashlib
import os
from pathlib import Path, PureWindowsPath

from icet_jax.errors import UserError
from icet_jax.files import LFS_ADVICE, is_lfs_pointer
from icet_jax.media.images import FORMATS, open_image, require_resizable

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MISSING, NOT_AN_IMAGE, DAMAGED = "missing image", "not an image", "damaged image"
OUTSIDE = "image path outside its folder"

_DRAWS = 100  # images that are tried for a row before the row is left out


class ImageFiles:
    """Checks each image file once, however many rows name it.

    Attributes:
      animated: checked files that hold several frames, of which only the first is used.
      replaced: problems of the files that were chosen for a row, could not be used and were replaced by others.
    """

    def __init__(self, *, decode: bool = False) -> None:
        """Starts without any checked file; with `decode`, pixels are decoded too, which finds damage beyond a file's
        header."""
        self.animated: set[Path] = set()
        self.replaced: dict[Path, str] = {}
        self._decode = decode
        self._problems: dict[Path, tuple[str, str] | None] = {}

    def problem(self, path: Path) -> tuple[str, str] | None:
        """Returns (reason, detail) of why a file cannot be used; None if it can."""
        if path not in self._problems:
            self._problems[path] = self._check(path)
        return self._problems[path]

    def draw(self, folder: "ImageFolder", seed: int, row_id: str) -> Path:
        """Returns the first usable image among a row's draws from `folder`; its first draw if none is usable."""
        first = path = folder.pick(seed, row_id)
        unusable: dict[Path, str] = {}
        for number in range(1, _DRAWS):
            problem = self.problem(path)
            if problem is None:
                self.replaced |= unusable
                return path
            unusable[path] = problem[1]
            path = folder.pick(seed, row_id, number)
        return first

    def _check(self, path: Path) -> tuple[str, str] | None:
        from PIL import Image

        if not os.path.isfile(path):  # unlike `Path.is_file`, false for names that no file can have
            return MISSING, f"no image file '{path}'"
        try:
            with Image.open(path, formats=FORMATS) as image:
                if getattr(image, "is_animated", False):
                    self.animated.add(path)
        except Image.DecompressionBombError:
            return DAMAGED, f"'{path}' is too large to be decoded safely"
        # Pillow's readers report damage in many ways (OSError, SyntaxError, struct.error, ...).
        except Exception:
            if is_lfs_pointer(path):
                return NOT_AN_IMAGE, f"'{path}' {LFS_ADVICE}"
            return NOT_AN_IMAGE, f"'{path}' is not an image that Pillow can read"
        if self._decode:
            try:
                require_resizable(open_image(path), str(path))
            except UserError as error:
                return DAMAGED, str(error)
        return None


def require_file_name(path: Path) -> None:
    """Raises a `UserError` if no file can have this name, because it holds NUL or half a character."""
    try:
        is_valid = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid:
        raise UserError(f"{path}: no file can have this name; check the path")


class ImageFolder:
    """Provides harmless images for prompts that come without one."""

    def __init__(self, folder: str | Path) -> None:
        """Lists the image files of the folder, sorted by name.

        Raises:
          UserError: there is no such folder, or it holds no image file.
        """
        self._folder = Path(folder)
        require_file_name(self._folder)
        try:
            names = sorted(entry.name for entry in os.scandir(self._folder) if entry.name.lower().endswith(SUFFIXES))
        except OSError as error:
            raise UserError(
                f"images={folder}: cannot be read ({error.strerror}); give the folder of the images (relative paths "
                "start from config.data.root)"
            ) from error
        if not names:
            raise UserError(f"images={folder}: holds no image file ({', '.join(SUFFIXES)})")
        self._names = names

    def pick(self, seed: int, row_id: str, draw: int = 0) -> Path:
        """Returns the image of a row, a pure function of (seed, row id, draw) and the sorted names in the folder.

        Args:
          seed: seed for the images of the data set.
          row_id: id of the row.
          draw: number of images that were drawn for the row before and could not be used.
        """
        label = f"{seed}\n{row_id}" + (f"\n{draw}" if draw else "")
        digest = hashlib.sha256(label.encode("utf-8", "surrogatepass")).digest()
        return self._folder / self._names[int.from_bytes(digest[:8], "big") % len(self._names)]


def leaves_root(root: Path, name: str) -> bool:
    """Returns whether an image path, relative to the folder of a data set's images, leads out of that folder.

    An absolute path may lead into the folder. A link may not lead out of it, except in the hub's cache, where every
    file of `snapshots/REVISION` is a link to a file in `blobs`.
    """
    windows = PureWindowsPath(name)
    if windows.drive or ".." in windows.parts or name.startswith("\\"):
        return True
    folder, target = Path(os.path.realpath(root)), Path(os.path.realpath(root / name))
    return not any(target.is_relative_to(inside) for inside in (folder, *_blobs(folder)))


def _blobs(folder: Path) -> list[Path]:
    """Returns the folders in which the hub's cache keeps the files of the snapshot that contains `folder`."""
    return [place.parent / "blobs" for place in folder.parents if place.name == "snapshots"]
