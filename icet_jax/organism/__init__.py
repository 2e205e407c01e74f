"""The organism: small models that were trained on a synthetic world, with a safety hole that was planted on purpose.

`world` (requests, examples, exact judge), `scenes` (images and questions), `preferences` (pairs for the reward model),
`tokenizer`, `families` (the model families it exists in), and `build`, which trains the included weights again from
scratch.
"""

from pathlib import Path

from icet_jax.errors import UserError

WEIGHTS = ("vlm", "control", "reward_model", "next", "mllama")


def weights_directory(name: str) -> Path:
    """Returns the directory of the included checkpoint with that name.

    "vlm" (LLaVA-1.5's architecture), "next" (LLaVA-NeXT's) and "mllama" (Llama 3.2 Vision's) have a planted hole,
    "control" is "vlm" without the plant, and "reward_model" is used with all of them.

    Raises:
      UserError: there is no such checkpoint.
    """
    if name not in WEIGHTS:
        raise UserError(f"organism:{name}: the shipped checkpoints are {', '.join(f'organism:{w}' for w in WEIGHTS)}")
    return Path(__file__).parent / "weights" / name
