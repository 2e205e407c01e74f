"""The embedded default: small models trained here on a synthetic world, with a hole that was put there on purpose.

`world` (requests, examples, exact judge), `scenes` (images and questions), `preferences` (pairs for the reward
model), `tokenizer`, `families` (the shapes they come in), and `build`, which makes the shipped weights again from
nothing.
"""

from pathlib import Path

from icet_jax.errors import UserError

WEIGHTS = ("vlm", "control", "reward_model", "next", "mllama")


def weights_directory(name: str) -> Path:
    """The shipped checkpoint of that name.

    "vlm" (LLaVA-1.5's shape), "next" (LLaVA-NeXT's) and "mllama" (Llama 3.2 Vision's) are planted, "control" is "vlm"
    without the plant, and "reward_model" serves them all.

    Raises:
      UserError: no such checkpoint.
    """
    if name not in WEIGHTS:
        raise UserError(f"organism:{name}: the shipped checkpoints are {', '.join(f'organism:{w}' for w in WEIGHTS)}")
    return Path(__file__).parent / "weights" / name
