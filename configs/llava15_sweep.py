"""Which exits of LLaVA-1.5 are unsafe: every exit on the paper's data sets by the paper's scorers, nothing trained.

    python -m icet_jax.main --mode=sweep --config=configs/llava15_sweep.py --config.data.root=DATA --workdir=runs/sweep

For DATA see configs/llava15_lppo.py; what both share is in `icet_jax.config.paper`.
"""

from icet_jax import config as icet_config


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:13b` is the larger model; `:smoke` runs every step in a minute on miniatures made on the spot."""
    icet_config.choose_variant(variant, ("13b", "smoke"))
    config = icet_config.paper.sweep(icet_config.paper.llava15("13b" if variant == "13b" else "7b"))
    return icet_config.paper.miniature(config, "llava15", exits=(1, 12, 23)) if variant == "smoke" else config
