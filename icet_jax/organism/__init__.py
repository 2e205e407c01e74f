"""The organism: small VLMs, trained on a synthetic world, whose safety hole was planted on purpose.

`world` has the requests, rows and the exact judge; `scenes` the images and questions; `preferences` the pairs for the
reward model; `families` the networks. `build` trains the embedded weights from scratch.
"""

from pathlib import Path

from icet_jax.errors import UserError

WEIGHTS = ("vlm", "control", "reward_model", "next", "mllama", "smolvlm")
"""Names of the embedded checkpoints."""


def weights_directory(name: str) -> Path:
    """Returns the directory of an embedded checkpoint.

    "vlm" (LLaVA-1.5's architecture), "next" (LLaVA-NeXT's), "mllama" (Llama 3.2 Vision's) and "smolvlm" (SmolVLM's)
    have a planted hole.
    "control" was trained as "vlm" was, but without the hole. "reward_model" serves all of them.

    Raises:
      UserError: there is no such checkpoint.
    """
    if name not in WEIGHTS:
        raise UserError(f"organism:{name}: the shipped checkpoints are {', '.join(f'organism:{w}' for w in WEIGHTS)}")
    return Path(__file__).parent / "weights" / name
