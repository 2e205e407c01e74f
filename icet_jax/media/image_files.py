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

_MAX_DRAWS = 100  # images that are tried for a row before the row is left out


class ImageFiles:
    """Checks image files, each only once, even if many rows name it.

    Attributes:
      animated: checked files with several frames, of which only the first is used.
      replaced: {unusable file: problem} of files that were drawn for a row and replaced by another draw.
    """

    def __init__(self, *, decode: bool = False) -> None:
        """Starts with no file checked.

        With `decode`, checks also decode the pixels, which finds damage after the file's header.
        """
        self.animated: set[Path] = set()
        self.replaced: dict[Path, str] = {}
        self._decode = decode
        self._problems: dict[Path, tuple[str, str] | None] = {}

    def problem(self, path: Path) -> tuple[str, str] | None:
        """Returns (kind of problem, message) of a file that cannot be used; None if it can be used.

        The kinds are `MISSING`, `NOT_AN_IMAGE` and `DAMAGED`.
        """
        if path not in self._problems:
            self._problems[path] = self._check(path)
        return self._problems[path]

    def draw(self, folder: "ImageFolder", seed: int, row_id: str) -> Path:
        """Draws images for a row from `folder`, one after another, and returns the first usable one.

        If `_MAX_DRAWS` images are unusable, the first one drawn is returned. For `seed` and `row_id` see
        `ImageFolder.choose`.
        """
        first = path = folder.choose(seed, row_id)
        unusable: dict[Path, str] = {}
        for number in range(1, _MAX_DRAWS):
            problem = self.problem(path)
            if problem is None:
                self.replaced |= unusable
                return path
            unusable[path] = problem[1]
            path = folder.choose(seed, row_id, number)
        return first

    def _check(self, path: Path) -> tuple[str, str] | None:
        """Opens a file and returns the result of `problem` for it."""
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
    """Raises a `UserError` if no file can have this name, because it contains NUL or is not valid Unicode."""
    try:
        is_valid = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid:
        raise UserError(f"{path}: no file can have this name; check the path")


class ImageFolder:
    """Chooses images from a folder for rows that have none."""

    def __init__(self, folder: str | Path) -> None:
        """Lists the image files of the folder, sorted by name.

        Raises:
          UserError: there is no such folder, or it contains no image file.
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
            raise UserError(f"images={folder}: contains no image file ({', '.join(SUFFIXES)})")
        self._names = names

    def choose(self, seed: int, row_id: str, draw: int = 0) -> Path:
        """Returns an image for a row, a pure function of the arguments and the sorted file names in the folder.

        Args:
          seed: seed of the data set's images.
          row_id: id of the row.
          draw: how many images were chosen for this row before and were unusable.
        """
        label = f"{seed}\n{row_id}" + (f"\n{draw}" if draw else "")
        digest = hashlib.sha256(label.encode("utf-8", "surrogatepass")).digest()
        return self._folder / self._names[int.from_bytes(digest[:8], "big") % len(self._names)]


def leaves_root(root: Path, name: str) -> bool:
    """Returns whether an image path leads out of the folder `root` of a data set's images.

    The path may be relative to `root` or absolute. Links out of `root`, `..` and Windows drives count as leading out,
    except that in the hub's cache every file of `snapshots/REVISION` may link to a file in `blobs`.
    """
    windows = PureWindowsPath(name)
    if windows.drive or ".." in windows.parts or name.startswith("\\"):
        return True
    folder, target = Path(os.path.realpath(root)), Path(os.path.realpath(root / name))
    return not any(target.is_relative_to(allowed) for allowed in (folder, *_blob_folders(folder)))


def _blob_folders(folder: Path) -> list[Path]:
    """Returns the folders with the hub cache's files if `folder` is in a snapshot of that cache; otherwise none."""
    return [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
