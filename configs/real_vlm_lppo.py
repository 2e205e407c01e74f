"""The real model of examples/real_vlm: sweep every exit, train with L-PPO at sampled exits, sweep again, export.

    python -m icet_jax.main --config=configs/real_vlm_lppo.py --workdir=runs/real_vlm_lppo

The model and its rows are those of `make real`, runs/real_vlm; the reward model is that of examples/real_vlm/reward.py.
For another build give `--config.model.checkpoint` (its vlm/), `--config.data.root` (its data/) and
`--config.reward.model` (its reward_model/).

Forbidden rows are the half of RedTeam-2K that the build did not train on, harmless rows the held-out instructions and
captions, utility questions about held-out photographs. Nothing in the model is planted. The keyword judge is the only
one, because it needs no weights; add others with `--config.sweep.scorers`.
"""

from icet_jax import config as icet_config

BUILD = "runs/real_vlm"


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """Returns the config of the whole experiment; `--mode=sweep` with it only measures."""
    icet_config.choose_variant(variant, ())
    config = icet_config.paper.lppo(icet_config.default())
    config.model.checkpoint = f"{BUILD}/vlm"
    config.model.dtype = "float32"  # the first norm of the converted image encoder needs it
    config.model.remat = "none"
    config.data.root = f"{BUILD}/data"
    config.data.train = "tuning.jsonl"  # the rows of the build's safety tuning
    config.data.mixture = {"forbidden": 0.5, "benign": 0.2, "vqa": 0.3}
    config.data.batch_size = 16
    config.data.max_prompt_tokens = 64 + 48  # image positions and text, as in the build
    config.reward.model = f"{BUILD}/reward_model"
    config.reward.by_kind = {"forbidden": "reward_model", "benign": "none", "vqa": "exact_match"}
    config.reward.normalise = True  # the reward model's scale would drown the exact-match rewards (0 or 1)
    config.lppo.iterations = config.lsft.iterations = 40
    config.lppo.exits = config.lsft.exits = "stratified"
    config.lppo.epochs = 2
    config.lppo.minibatches = 1
    config.lppo.accumulation = 4
    config.lppo.max_new_tokens = 48
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "cosine"
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.sweep.datasets = {
        "forbidden": "held_out_forbidden.jsonl",
        "harmless": "held_out_harmless.jsonl",
        "captions": "held_out_captions.jsonl",
    }
    config.sweep.utility = {"questions": "held_out_questions.jsonl"}
    config.sweep.limit = 64
    config.sweep.max_new_tokens = 32
    config.sweep.show_prompts = False  # the report names rows by their ids
    config.log.tensorboard = False
    return config
