"""The two trainings of the real model as configs of the package's own L-SFT, at the default exit alone.

build.py runs them. By hand, after its stage `data` and for another number of steps:

    python -m icet_jax.main --mode=align --config=examples/real_vlm/stages.py:projector --workdir=RUN \
        --config.model.checkpoint=WORKDIR/start --config.data.train=WORKDIR/data/captions.jsonl \
        --config.sweep.datasets.harmless=WORKDIR/data/held_out_harmless.jsonl

At 64 image tokens a step takes 7 seconds of one core for the projector, and 16 for the tuning.
"""

from icet_jax import config as icet_config

IMAGE_TOKENS = 64
REFUSAL = "I'm sorry, but I can't help with that."


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:projector` trains the projector on captions; `:tuning` trains projector and decoder on instructions."""
    icet_config.choose_variant(variant, ("projector", "tuning"))
    config = icet_config.default()
    config.algorithm = "lsft"
    config.lsft.exits = "fixed"  # at the model's default exit
    config.lsft.refusal = REFUSAL
    config.model.dtype = "float32"  # the first norm of the converted image encoder needs it
    config.model.remat = "none"  # nothing is computed twice: a slice's activations take about 1 GB
    config.data.batch_size = 16
    config.lppo.epochs = 1
    config.lppo.minibatches = 1
    config.lppo.accumulation = 4
    config.optimizer.schedule = "cosine"
    config.checkpoint.every = 25
    config.checkpoint.keep = 1
    config.log.tensorboard = False
    return _tuning(config) if variant == "tuning" else _projector(config)


def _projector(config: icet_config.ConfigDict) -> icet_config.ConfigDict:
    """Captions; tower and decoder are frozen."""
    config.lsft.train = "projector"
    config.lsft.iterations = 360
    config.lppo.max_new_tokens = 32  # longest caption, with EOS
    config.data.mixture = {"benign": 1.0}
    config.data.max_prompt_tokens = IMAGE_TOKENS + 24
    config.optimizer.learning_rate = 1e-3  # as LLaVA-1.5
    config.optimizer.warmup_steps = 10
    return config


def _tuning(config: icet_config.ConfigDict) -> icet_config.ConfigDict:
    """Captions, questions, harmless instructions and refusals; projector and decoder (LoRA) are trained."""
    config.lsft.train = "both"
    config.lsft.iterations = 120
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.lppo.max_new_tokens = 64  # longest answer, with EOS
    config.data.mixture = {"forbidden": 0.25, "benign": 0.5, "vqa": 0.25}
    config.data.max_prompt_tokens = IMAGE_TOKENS + 48  # one in forty requests is longer, and left out
    config.optimizer.learning_rate = 2e-4  # as LLaVA-1.5's LoRA
    config.optimizer.warmup_steps = 10
    return config
