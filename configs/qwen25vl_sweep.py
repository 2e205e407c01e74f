"""Which exits of Qwen2.5-VL are unsafe: every exit on the paper's data sets by the paper's scorers.

    python -m icet_jax.main --mode=sweep --config=configs/qwen25vl_sweep.py --config.data.root=DATA \\
      --workdir=runs/qwen25vl_sweep

For DATA see configs/llava15_lppo.py; what all experiments share is in `icet_jax.config.paper`.
"""

from icet_jax import config as icet_config

_SIZES = ("3b", "32b")


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:3b` and `:32b` are other sizes than 7B; `:smoke` runs every step on miniatures in a minute."""
    icet_config.choose_variant(variant, (*_SIZES, "smoke"))
    config = icet_config.paper.sweep(icet_config.paper.qwen25vl(variant if variant in _SIZES else "7b"))
    return icet_config.paper.miniature(config, "qwen2_5_vl", exits=(1, 16, 32)) if variant == "smoke" else config
