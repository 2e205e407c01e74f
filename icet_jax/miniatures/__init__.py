"""Toy checkpoints and small data sets in the published formats, created when a config names `toy:...`.

They show that a config for the real models runs from beginning to end. Weights and images are random and prompts are
placeholders, so the results have no meaning.

Tests that compare with transformers use other small checkpoints (`tests/tiny*.py`), which transformers itself writes.

    python -m icet_jax.main --config=configs/llava_next_lppo.py:smoke --workdir=runs/smoke
"""

import tempfile
from pathlib import Path

import numpy as np

from icet_jax.config.names import KINDS
from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.miniatures import scorers, vlms

_ROWS = 64


def checkpoint(name: str, workdir: Path | None = None) -> Path:
    """Returns the directory of the checkpoint `toy:NAME`, which is created unless it exists.

    It is in `workdir`/toy, or in a temporary folder if there is no run directory.

    Raises:
      UserError: the name is unknown.
    """
    writers = {
        **{name: (name, write) for name, write in vlms.WRITERS.items()},
        "reward_model": ("reward_model", scorers.harmless_reward),
        **scorers.WRITERS,
    }
    if name not in writers:
        raise UserError(f"toy:{name}: no such toy checkpoint; there are {', '.join(writers)}")
    directory, write = writers[name]
    folder = (Path(tempfile.mkdtemp(prefix="icet_jax_toy_")) if workdir is None else workdir / "toy") / directory
    if not (folder / "config.json").is_file():
        write(folder)
    return folder


def rows(kind: str) -> list[Example]:
    """Returns 64 rows of one kind, or of each kind for "mixed", with placeholder prompts and noise images.

    Raises:
      UserError: the kind is unknown.
    """
    if kind == "mixed":
        return [row for kind in KINDS for row in rows(kind)]
    if kind not in KINDS:
        raise UserError(f"toy:{kind}: no such rows; there are mixed, {', '.join(KINDS)}")
    noise = np.random.default_rng(KINDS.index(kind))
    return [
        Example(
            id=f"toy-{kind}-{index}",
            prompt=f"placeholder {kind} request {index}",
            images=(noise.integers(0, 256, (vlms.IMAGE_SIZE, vlms.IMAGE_SIZE, 3), dtype=np.uint8),),
            kind=kind,
            answer=None if kind == "forbidden" else f"answer {index % 4}",
        )
        for index in range(_ROWS)
    ]
