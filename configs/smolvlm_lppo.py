"""L-PPO on SmolVLM, which the paper neither measures nor aligns: sweep, train, sweep again, export.

    python -m icet_jax.main --config=configs/smolvlm_lppo.py --config.data.root=DATA --workdir=runs/smolvlm

For DATA, and for the over-refusal that `:mixed` is against, see configs/llava15_lppo.py; what all experiments share is
in `icet_jax.config.paper`.
"""

from icet_jax import config as icet_config

_SIZES = ("256m", "2b")


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:256m` and `:2b` are other sizes than 500M; `:mixed` trains on benign and VQA rows too.

    `:best` is the method that docs/methods.md recommends, on the same rows. `:smoke` runs every step on miniatures in
    minutes.
    """
    icet_config.choose_variant(variant, (*_SIZES, "mixed", "best", "smoke"))
    config = icet_config.paper.lppo(icet_config.paper.smolvlm(variant if variant in _SIZES else "500m"))
    if variant == "mixed":
        return icet_config.paper.mixed(config)
    if variant == "best":
        return icet_config.paper.best(config)
    if variant == "smoke":
        config = icet_config.paper.miniature(config, "smolvlm", exits=(1, 6, 12))
        config.data.max_prompt_tokens = 224  # an image of 17 tiles takes 108 positions
    return config
