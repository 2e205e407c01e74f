"""Which exits of Llama 3.2 Vision (11B) are unsafe: every exit on the paper's data sets by the paper's scorers.

    python -m icet_jax.main --mode=sweep --config=configs/llama32v_sweep.py --config.data.root=DATA \\
      --workdir=runs/llama32v_sweep

For DATA see configs/llava15_lppo.py; what all experiments share is in `icet_jax.config.paper`.
What exit l means in this family, and what E2 and E5 mean: docs/families.md.
"""

from icet_jax import config as icet_config


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:E2` and `:E5` read exits in the other ways (E1 is the default); `:smoke` runs every step on miniatures."""
    icet_config.choose_variant(variant, ("E2", "E5", "smoke"))
    config = icet_config.paper.sweep(icet_config.paper.llama32v())
    if variant in ("E2", "E5"):
        config.model.exit_rule = variant
    return icet_config.paper.miniature(config, "mllama", exits=(1, 16, 32)) if variant == "smoke" else config
