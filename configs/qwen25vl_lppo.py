"""L-PPO on Qwen2.5-VL, which the paper neither measures nor aligns: sweep, train, sweep again, export.

    python -m icet_jax.main --config=configs/qwen25vl_lppo.py --config.data.root=DATA --workdir=runs/qwen25vl

For DATA, and for the over-refusal that `:mixed` is against, see configs/llava15_lppo.py; what all experiments share is
in `icet_jax.config.paper`.
"""

from icet_jax import config as icet_config

_SIZES = ("3b", "32b")


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:3b` and `:32b` are other sizes than 7B; `:mixed` trains on benign and VQA rows too.

    `:best` is the method that docs/methods.md recommends, on the same rows. `:smoke` runs every step on miniatures in
    minutes.
    """
    icet_config.choose_variant(variant, (*_SIZES, "mixed", "best", "smoke"))
    config = icet_config.paper.lppo(icet_config.paper.qwen25vl(variant if variant in _SIZES else "7b"))
    if variant == "mixed":
        return icet_config.paper.mixed(config)
    if variant == "best":
        return icet_config.paper.best(config)
    if variant == "smoke":
        config = icet_config.paper.miniature(config, "qwen2_5_vl", exits=(1, 16, 32))
        config.data.max_prompt_tokens = 160  # the chat template takes 32 positions of bytes
    return config
