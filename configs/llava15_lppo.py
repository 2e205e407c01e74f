"""L-PPO on LLaVA-1.5-7B with the paper's setting; trained on RedTeam-2K prompts with benign images.

The rows are yours to bring (none may be vendored): `--config.data.train=FILE` and `--config.sweep.datasets.NAME=FILE`,
each a .csv or .jsonl of prompt, image[, id, policy, kind, answer].
"""

from icet_jax import config as icet_config


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:smoke` runs every step of it in a minute on a LLaVA-1.5-shaped model of toy size, made on the spot."""
    icet_config.choose_variant(variant, ("smoke",))
    config = icet_config.default()
    config.model.checkpoint = "llava-hf/llava-1.5-7b-hf"
    config.reward.model = "Ray2333/gpt2-large-harmless-reward_model"
    config.sweep.scorers = ("refusal_keywords", "Ray2333/gpt2-large-harmless-reward_model")
    return _smoke(config) if variant == "smoke" else config


def _smoke(config: icet_config.ConfigDict) -> icet_config.ConfigDict:
    """The same run on `icet_jax.runs.toy`: 24 exits, random weights, random images, placeholder prompts."""
    config.model.checkpoint = "toy:llava15"
    config.model.dtype = "float32"
    config.reward.model = "toy:reward_model"
    config.lora.rank = 4
    config.lora.alpha = 8.0
    config.data.train = "toy:forbidden"
    config.data.batch_size = 8
    config.data.max_prompt_tokens = 64
    config.lppo.iterations = 2
    config.lppo.epochs = 2
    config.lppo.minibatches = 2
    config.lppo.accumulation = 2
    config.lppo.max_new_tokens = 8
    config.lsft.iterations = 2
    config.sweep.datasets = {"forbidden": "toy:forbidden", "benign": "toy:benign"}
    config.sweep.utility = {"vqa": "toy:vqa"}
    config.sweep.exits = (1, 12, 23)
    config.sweep.limit = 4
    config.sweep.batch_size = 4
    config.sweep.max_new_tokens = 8
    config.sweep.scorers = ("refusal_keywords", "toy:reward_model")
    config.checkpoint.every = 1
    return config
