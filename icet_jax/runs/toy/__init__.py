"""Networks of toy size and small data sets in the published formats, made on the spot: `toy:...` sources.

They show that a config for the real models runs from end to end. Random weights, random images, placeholder prompts:
nothing that comes out of them means anything.

    python -m icet_jax.main --config=configs/llava15_lppo.py:smoke --workdir=runs/smoke
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from icet_jax.checkpoints.hf_export import save_gpt2_reward, save_vlm
from icet_jax.data.records import KINDS, Example
from icet_jax.errors import UserError
from icet_jax.models.clip import ClipConfig
from icet_jax.models.gpt2 import GPT2Config, GPT2RewardModel
from icet_jax.models.llama import LlamaConfig
from icet_jax.models.llava import Llava, LlavaConfig
from icet_jax.runs.toy import scorers
from icet_jax.runs.toy.tokenizers import BYTES, write_json, write_tokenizer

_SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
_IMAGE_SIZE, _PATCH_SIZE = 28, 14
_ROWS = 64

# As LLaVA-1.5: 24 vision blocks, default exit 23, no grouped queries, a vocabulary with rows to spare.
LLAVA = LlavaConfig(
    vision=ClipConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=24,
        num_attention_heads=2,
        image_size=_IMAGE_SIZE,
        patch_size=_PATCH_SIZE,
    ),
    text=LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
    ),
    image_token_index=_SPECIAL.index("<image>"),
)
REWARD = GPT2Config(vocab_size=BYTES + 1, n_positions=256, n_embd=16, n_layer=2, n_head=2, n_inner=64)


def checkpoint(name: str, workdir: Path | None = None) -> Path:
    """The directory of `toy:NAME`, made under `workdir`/toy (a temporary folder if None) unless it is there.

    Raises:
      UserError: an unknown name.
    """
    makers = {
        "llava15": ("llava15", _save_llava),
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
            images=(noise.integers(0, 256, (_IMAGE_SIZE, _IMAGE_SIZE, 3), dtype=np.uint8),),
            kind=kind,
            answer=None if kind == "forbidden" else f"answer {index % 4}",
        )
        for index in range(_ROWS)
    ]


def _save_llava(folder: Path) -> None:
    params = _spread(nnx.split(Llava(LLAVA, rngs=nnx.Rngs(0)))[1])
    save_vlm(folder, LLAVA, params)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_tokenizer(folder, _SPECIAL, single="<s> $A", pair="<s> $A $B", settings=roles)
    write_json(folder / "generation_config.json", {f"{role}_id": _SPECIAL.index(name) for role, name in roles.items()})
    size = {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": _IMAGE_SIZE},
            "crop_size": size,
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )


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
