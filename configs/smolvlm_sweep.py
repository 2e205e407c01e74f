"""Which exits of SmolVLM are unsafe: every exit on the paper's data sets by the paper's scorers.

    python -m icet_jax.main --mode=sweep --config=configs/smolvlm_sweep.py --config.data.root=DATA \\
      --workdir=runs/smolvlm_sweep

For DATA see configs/llava15_lppo.py; what all experiments share is in `icet_jax.config.paper`.
"""

from icet_jax import config as icet_config

_SIZES = ("256m", "2b")


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:256m` and `:2b` are other sizes than 500M; `:smoke` runs every step on miniatures in a minute."""
    icet_config.choose_variant(variant, (*_SIZES, "smoke"))
    config = icet_config.paper.sweep(icet_config.paper.smolvlm(variant if variant in _SIZES else "500m"))
    return icet_config.paper.miniature(config, "smolvlm", exits=(1, 6, 12)) if variant == "smoke" else config
