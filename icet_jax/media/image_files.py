"""Image files that rows name: whether each can be used, and which one a row without its own is given."""

import hashlib
import os
from pathlib import Path, PureWindowsPath

from icet_jax.errors import UserError
from icet_jax.files import LFS_ADVICE, is_lfs_pointer
from icet_jax.media.images import FORMATS, open_image, require_resizable

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MISSING, NOT_AN_IMAGE, DAMAGED = "missing image", "not an image", "damaged image"
OUTSIDE = "image path outside its folder"

_DRAWS = 100  # of an image for a row, before the row is left out


class ImageFiles:
    """Looks at each image file once, however many rows name it.

    Attributes:
      animated: files looked at so far that hold several frames, of which the first one is used.
      replaced: what is wrong with the files that were drawn for a row and gave way to another.
    """

    def __init__(self, *, decode: bool = False) -> None:
        """`decode`: whether pixels are decoded too, which finds damage that a file's first bytes do not show."""
        self.animated: set[Path] = set()
        self.replaced: dict[Path, str] = {}
        self._decode = decode
        self._problems: dict[Path, tuple[str, str] | None] = {}

    def problem(self, path: Path) -> tuple[str, str] | None:
        """(reason, detail) why a file cannot be used; None where it can."""
        if path not in self._problems:
            self._problems[path] = self._look(path)
        return self._problems[path]

    def draw(self, folder: "ImageFolder", seed: int, row_id: str) -> Path:
        """The first of a row's draws from `folder` that can be used; its first draw where none can."""
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

    def _look(self, path: Path) -> tuple[str, str] | None:
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
    """Raises a `UserError` where no file can have this name (it holds NUL or half a character)."""
    try:
        named = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise UserError(f"{path}: no file can have this name; check the path")


class ImageFolder:
    """Benign images for prompts that come without one."""

    def __init__(self, folder: str | Path) -> None:
        """Lists the folder's image files, by name.

        Raises:
          UserError: no such folder, or no image file in it.
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
        """The image of a row: a pure function of (seed, row id, draw) and the folder's sorted names.

        Args:
          seed: of the data set's images.
          row_id: the row's.
          draw: how many images were drawn for the row before this one, and could not be used.
        """
        drawn = f"{seed}\n{row_id}" + (f"\n{draw}" if draw else "")
        digest = hashlib.sha256(drawn.encode("utf-8", "surrogatepass")).digest()
        return self._folder / self._names[int.from_bytes(digest[:8], "big") % len(self._names)]


def leaves_root(root: Path, name: str) -> bool:
    """Whether an image that a data set names, relative to the folder of its images, lies outside of that folder.

    An absolute path may lead into the folder. A link may not lead out of it, except in the hub's cache, where every
    file of a `snapshots/REVISION` is a link to one in `blobs`.
    """
    windows = PureWindowsPath(name)
    if windows.drive or ".." in windows.parts or name.startswith("\\"):
        return True
    folder, target = Path(os.path.realpath(root)), Path(os.path.realpath(root / name))
    return not any(target.is_relative_to(inside) for inside in (folder, *_blobs(folder)))


def _blobs(folder: Path) -> list[Path]:
    """Where the hub's cache keeps the files of a snapshot that `folder` is, or is a part of."""
    return [place.parent / "blobs" for place in folder.parents if place.name == "snapshots"]
