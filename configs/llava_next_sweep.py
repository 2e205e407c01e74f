"""Which exits of LLaVA-NeXT (v1.6) are unsafe: every exit on the paper's data sets by the paper's scorers.

    python -m icet_jax.main --mode=sweep --config=configs/llava_next_sweep.py --config.data.root=DATA \\
      --workdir=runs/next_sweep

For DATA see configs/llava15_lppo.py; what all experiments share is in `icet_jax.config.paper`.
"""

from icet_jax import config as icet_config

_BACKBONES = {"13b": "vicuna-13b", "mistral": "mistral-7b"}


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:13b` and `:mistral` are other backbones than Vicuna-7B; `:smoke` runs every step on miniatures in a minute."""
    icet_config.choose_variant(variant, (*_BACKBONES, "smoke"))
    config = icet_config.paper.sweep(icet_config.paper.llava_next(_BACKBONES.get(variant, "vicuna-7b")))
    return icet_config.paper.miniature(config, "llava_next", exits=(1, 12, 23)) if variant == "smoke" else config
