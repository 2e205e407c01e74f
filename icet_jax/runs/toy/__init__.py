"""Networks of toy size and small data sets in the published formats, made on the spot: `toy:...` sources.

They show that a config for the real models runs from end to end. Random weights, random images, placeholder prompts:
nothing that comes out of them means anything.

    python -m icet_jax.main --config=configs/llava_next_lppo.py:smoke --workdir=runs/smoke
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from icet_jax.checkpoints.hf_export import save_gpt2_reward
from icet_jax.data.records import KINDS, Example
from icet_jax.errors import UserError
from icet_jax.models.gpt2 import GPT2Config, GPT2RewardModel
from icet_jax.runs.toy import scorers, vlms
from icet_jax.runs.toy.tokenizers import BYTES, write_json, write_tokenizer

_ROWS = 64

REWARD = GPT2Config(vocab_size=BYTES + 1, n_positions=256, n_embd=16, n_layer=2, n_head=2, n_inner=64)


def checkpoint(name: str, workdir: Path | None = None) -> Path:
    """The directory of `toy:NAME`, made under `workdir`/toy (a temporary folder if None) unless it is there.

    Raises:
      UserError: an unknown name.
    """
    makers = {
        **{name: (name, make) for name, make in vlms.MAKERS.items()},
        "reward_model": ("reward_model", _save_reward_model),
        **scorers.MAKERS,
    }
    if name not in makers:
        raise UserError(f"toy:{name}: no such toy checkpoint; there are {', '.join(makers)}")
    directory, make = makers[name]
    folder = (Path(tempfile.mkdtemp(prefix="icet_jax_toy_")) if workdir is None else workdir / "toy") / directory
    if not (folder / "config.json").is_file():
        make(folder)
    return folder


def rows(kind: str) -> list[Example]:
    """64 rows of one kind ("mixed": 64 of each): invented words and noise images.

    Raises:
      UserError: an unknown kind.
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


def _save_reward_model(folder: Path) -> None:
    params = _spread(nnx.split(GPT2RewardModel(REWARD, rngs=nnx.Rngs(1)))[1])
    save_gpt2_reward(folder, REWARD, params)
    end = "<|endoftext|>"
    write_tokenizer(folder, (end,), settings={"bos_token": end, "eos_token": end, "pad_token": end})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})


def _spread(params: Any) -> Any:
    """Larger random weights, so that exits, images and tokens change the output."""
    return jax.tree.map(lambda leaf: leaf * 2 if leaf.ndim > 1 else leaf, params)
