"""L-PPO on LLaVA-NeXT (v1.6), which the paper measures and does not align: sweep, train, sweep again, export.

    python -m icet_jax.main --config=configs/llava_next_lppo.py --config.data.root=DATA --workdir=runs/llava_next

For DATA, and for the over-refusal that `:mixed` is against, see configs/llava15_lppo.py; what all experiments share is
in `icet_jax.config.paper`.
"""

from icet_jax import config as icet_config

_BACKBONES = {"13b": "vicuna-13b", "mistral": "mistral-7b"}


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:13b` and `:mistral` are other backbones than Vicuna-7B; `:mixed` trains on benign and VQA rows too.

    `:best` is the method that docs/methods.md recommends, on the same rows. `:smoke` runs every step on miniatures in
    minutes.
    """
    icet_config.choose_variant(variant, (*_BACKBONES, "mixed", "best", "smoke"))
    config = icet_config.paper.lppo(icet_config.paper.llava_next(_BACKBONES.get(variant, "vicuna-7b")))
    if variant == "mixed":
        return icet_config.paper.mixed(config)
    if variant == "best":
        return icet_config.paper.best(config)
    return icet_config.paper.miniature(config, "llava_next", exits=(1, 12, 23)) if variant == "smoke" else config
