"""A GPT-2 reward model like the paper's, trained on HH-RLHF's preference pairs with -log sigmoid(r_w - r_l).

    python -m icet_jax.main --mode=reward --config=configs/rm_gpt2.py --workdir=runs/rm \\
      --config.rm.train=harmless-base/train.jsonl.gz --config.rm.held_out=harmless-base/test.jsonl.gz

The pairs are yours to bring (none may be vendored). The result is runs/rm/hf, an ordinary
`GPT2ForSequenceClassification`: `--config.reward.model=runs/rm/hf` and `config.sweep.scorers` take it. The public model
of this kind is Ray2333/gpt2-large-harmless-reward_model.
"""

from icet_jax import config as icet_config


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:smoke` runs every step of it in a minute on a GPT-2 of toy size and harmless invented pairs."""
    icet_config.choose_variant(variant, ("smoke",))
    config = icet_config.default()
    config.model.checkpoint = "openai-community/gpt2-large"  # the paper's reward model has its shape
    config.optimizer.learning_rate = 1e-5  # ours; Ouyang et al. 2022 take 9e-6
    config.optimizer.schedule = "cosine"  # to zero; Ouyang et al. 2022 end at a tenth
    config.optimizer.warmup_steps = 20  # ours: the score head is new
    config.checkpoint.every = 200  # steps; weights and AdamW's moments are 9 GB for gpt2-large
    config.checkpoint.keep = 1
    config.log.every = 10  # steps
    return _smoke(config) if variant == "smoke" else config


def _smoke(config: icet_config.ConfigDict) -> icet_config.ConfigDict:
    config.model.checkpoint = "toy:reward_model"
    config.model.dtype = "float32"
    config.rm.train = "organism:train:256"
    config.rm.held_out = "organism:test:128"
    config.rm.max_tokens = 256
    config.rm.batch_size = 16
    config.rm.accumulation = 2
    config.rm.length_window = 4
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 2
    config.checkpoint.every = 8
    config.log.every = 1
    return config
