"""L-PPO on Llama 3.2 Vision (11B), which the paper measures and does not align: sweep, train, sweep again, export.

    python -m icet_jax.main --config=configs/llama32v_lppo.py --config.data.root=DATA --workdir=runs/llama32v

For DATA, and for the over-refusal that `:mixed` is against, see configs/llava15_lppo.py; what all experiments share is
in `icet_jax.config.paper`.
What exit l means in this family, and what E2 and E5 mean: docs/families.md.
"""

from icet_jax import config as icet_config


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:E2` and `:E5` read exits in the other ways (E1 is the default); `:mixed` trains on benign and VQA rows too.

    `:best` is the method that docs/methods.md recommends, on the same rows. `:smoke` runs every step on miniatures.
    """
    icet_config.choose_variant(variant, ("E2", "E5", "mixed", "best", "smoke"))
    config = icet_config.paper.lppo(icet_config.paper.llama32v())
    if variant in ("E2", "E5"):
        config.model.exit_rule = variant
    if variant == "mixed":
        return icet_config.paper.mixed(config)
    if variant == "best":
        return icet_config.paper.best(config)
    return icet_config.paper.miniature(config, "mllama", exits=(1, 16, 32)) if variant == "smoke" else config
