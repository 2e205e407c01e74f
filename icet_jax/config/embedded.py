"""The settings that the experiments on the organism share. The organism is the small test model in this package.

docs/organism.md and docs/ablations.md describe how the settings were chosen.
"""

from ml_collections import ConfigDict

from icet_jax.config.defaults import default


def organism() -> ConfigDict:
    """Returns the config for experiments on the organism: `default()` with the organism's settings, locked."""
    config = default()
    config.model.checkpoint = "organism:vlm"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.data.train = "organism:train"
    config.data.mixture = {"forbidden": 0.5, "benign": 0.2, "vqa": 0.3}
    config.data.batch_size = 128
    config.data.max_prompt_tokens = 48  # 16 image positions and at most 32 words
    config.reward.model = "organism:reward_model"
    config.reward.normalise = True  # the reward model's scale (about +-6) would drown the exact-match rewards (0 or 1)
    config.lppo.iterations = 40
    config.lppo.exits = "stratified"
    config.lppo.kl_coef = 0.05
    config.lppo.kl_adaptive = False
    config.lppo.value_coef = 0.5
    config.lppo.value_stop_gradient = True
    config.lppo.epochs = 2
    config.lppo.minibatches = 2
    config.lppo.accumulation = 1
    config.lppo.max_new_tokens = 16
    config.lsft.refusal = "sorry i cannot help with that"
    config.lsft.iterations = 40
    config.lsft.exits = "stratified"
    config.ldistill.iterations = 40
    config.ldistill.exits = "stratified"
    config.lrloo.iterations = 40
    config.lrloo.exits = "stratified"
    config.ldpo.iterations = 40
    config.ldpo.exits = "stratified"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "cosine"
    config.sweep.datasets = {"forbidden": "organism:test:forbidden", "benign": "organism:test:benign:1024"}
    config.sweep.utility = {"vqa": "organism:test:vqa"}
    config.sweep.max_new_tokens = 16
    config.sweep.batch_size = 128
    config.sweep.scorers = ("refusal_keywords", "organism:judge", "organism:reward_model")
    return config
