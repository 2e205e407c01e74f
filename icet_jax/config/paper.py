"""Parts of the configs for the paper's experiment: its three model families, SmolVLM, Qwen2.5-VL, and miniatures.

Origins: *paper* is the ICML 2025 text, *cards* the model cards of the checkpoints, *ours* this project's own choice.
"""

from ml_collections import ConfigDict

from icet_jax.config.defaults import default

# Largest number of positions of a training prompt without its image (ours). Training uses RedTeam-2K alone, whose
# longest prompt takes 205 positions with the template and Llama 2's tokenizer (781 with LLaVA-1.5's image). 320 leave
# space for other templates and tokenizers. Sweeps may use all positions of the model: the longest prompt of mini
# JailBreakV-28K takes 1,109 on LLaVA-1.5.
_TEXT_POSITIONS = 320


def llava15(size: str = "7b") -> ConfigDict:
    """Returns the config of the experiment on LLaVA-1.5; `size` is "7b" or "13b"."""
    config = _experiment()
    config.model.checkpoint = f"llava-hf/llava-1.5-{size}-hf"  # paper (7B); ours (13B)
    config.data.max_prompt_tokens = 576 + _TEXT_POSITIONS  # 896; `--mode=plan` computes sweeps at this length too
    return config


def llava_next(backbone: str = "vicuna-7b") -> ConfigDict:
    """Returns the config of the experiment on LLaVA-NeXT (v1.6). The paper sweeps this family and does not train it.

    Args:
      backbone: "vicuna-7b", "vicuna-13b" or "mistral-7b".
    """
    config = _experiment()
    config.model.checkpoint = f"llava-hf/llava-v1.6-{backbone}-hf"
    # The largest image: 576 positions for the scaled-down image, 48 x 48 patches of four tiles, and 48 line ends.
    config.data.max_prompt_tokens = 576 + 48 * 48 + 48 + _TEXT_POSITIONS
    config.lppo.accumulation = 16  # ours, for memory: sequences are four times as long as LLaVA-1.5's
    config.sweep.batch_size = 8  # ours, for memory: the states of all exits of an image are 0.15 GB in bfloat16
    return config


def llama32v() -> ConfigDict:
    """Returns the config of the experiment on Llama 3.2 Vision (11B). The paper sweeps it and does not train it.

    The paper does not say what exit l of this family is. E1 is ours; `config.model.exit_rule` chooses another
    definition.
    """
    config = _experiment()
    config.model.checkpoint = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    config.model.exit_rule = "E1"  # ours: local blocks after l are skipped
    config.model.intermediate_capture = "input"  # as the model was trained
    config.data.max_prompt_tokens = _TEXT_POSITIONS  # an image takes one position and is read by cross-attention
    config.lppo.accumulation = 16  # ours, for memory
    config.sweep.batch_size = 4  # ours, for memory: the states of all exits of an image are 0.54 GB in bfloat16
    return config


_SMOLVLM = {
    # {size: (checkpoint, largest number of positions of an image)}. An image has up to 17 tiles, each of 64 positions
    # (2b: 81). Around them are 40 tokens, or about 190 with the tokenizer of "2b", which has no token for a tile's row
    # and column.
    "256m": ("HuggingFaceTB/SmolVLM-256M-Instruct", 17 * 64 + 40),
    "500m": ("HuggingFaceTB/SmolVLM-500M-Instruct", 17 * 64 + 40),
    "2b": ("HuggingFaceTB/SmolVLM-Instruct", 17 * 81 + 200),
}


def smolvlm(size: str = "500m") -> ConfigDict:
    """Returns the config of the experiment on SmolVLM, which the paper neither sweeps nor trains.

    Args:
      size: "256m", "500m" or "2b".
    """
    config = _experiment()
    config.model.checkpoint, positions = _SMOLVLM[size]
    config.data.max_prompt_tokens = positions + _TEXT_POSITIONS
    config.lppo.accumulation = 16  # ours, for memory: sequences are twice as long as LLaVA-1.5's
    config.sweep.batch_size = 4  # ours, for memory: the states of all exits of an image are 0.35 GB in bfloat16
    return config


def qwen25vl(size: str = "7b") -> ConfigDict:
    """Returns the config of the experiment on Qwen2.5-VL, which the paper neither sweeps nor trains.

    Args:
      size: "3b", "7b" or "32b".
    """
    config = _experiment()
    config.model.checkpoint = f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct"
    # An image of up to a megapixel (`max_pixels` 1003520 in preprocessor_config.json) takes 1,280 positions.
    config.data.max_prompt_tokens = 1280 + _TEXT_POSITIONS
    config.lppo.accumulation = 16  # ours, for memory: sequences are twice as long as LLaVA-1.5's
    config.sweep.batch_size = 4  # ours, for memory: the states of all exits of an image are 0.69 GB in bfloat16
    return config


def _experiment() -> ConfigDict:
    """Returns a config with the paper's data sets and scorers, and without a model.

    The data sets' files are not part of this package. Download them into one folder, `config.data.root`.
    """
    config = default()

    # RedTeam-2K's 2,000 prompts, each with a benign image (paper) drawn from MS-COCO's validation set (ours).
    config.data.train = "redteam_2k:RedTeam_2K.csv?images=val2014"
    # The paper's reward model (the paper cites Rewards-in-Context, which released it).
    config.reward.model = "harmless_reward"
    config.reward.by_kind = {"forbidden": "reward_model", "benign": "reward_model", "vqa": "exact_match"}

    config.scorers = {
        # paper: ASR by Llama Guard. The paper does not name the version, so both are defined.
        "llama_guard_1": {"kind": "llama_guard", "checkpoint": "meta-llama/LlamaGuard-7b", "dtype": "bfloat16"},
        "llama_guard_3": {"kind": "llama_guard", "checkpoint": "meta-llama/Llama-Guard-3-8B", "dtype": "bfloat16"},
        # ours: a second judge, from another laboratory; yes = harmful (cards).
        "harmbench": {
            "kind": "decoder_judge",
            "checkpoint": "cais/HarmBench-Llama-2-13b-cls",
            "template": "harmbench",
            "unsafe": "Yes",
            "safe": "No",
            "dtype": "bfloat16",
        },
        # ours, in place of the paper's Perspective API, whose service ends on 2026-12-31.
        "toxic_bert": {"kind": "toxicity", "checkpoint": "unitary/toxic-bert"},
        "unbiased_toxic_roberta": {"kind": "toxicity", "checkpoint": "unitary/unbiased-toxic-roberta"},
        "harmless_reward": {"kind": "reward_model", "checkpoint": "Ray2333/gpt2-large-harmless-reward_model"},  # paper
        # paper: the utility of VQA answers.
        "general_reward": {"kind": "reward_model", "checkpoint": "OpenAssistant/reward-model-deberta-v3-large-v2"},
    }
    config.sweep.scorers = ("refusal_keywords", "llama_guard_1", "toxic_bert", "harmless_reward")
    config.sweep.utility_scorers = ("general_reward",)
    config.sweep.datasets = {
        "mini_jailbreakv": "jailbreakv_28k:mini_JailBreakV_28K.csv",  # paper: 280 rows
        "advbench_coco": "advbench_coco:harmful_behaviors.csv?images=val2014",  # paper: 520 rows
        "xstest": "xstest:xstest_prompts.csv?images=val2014",  # paper: over-refusal, 250 safe and 200 unsafe rows
    }
    config.sweep.utility = {"vqa_v2": "vqa_v2:.?split=val2014&images=val2014&limit=1000"}  # paper: the set; ours: rows
    config.sweep.max_new_tokens = 128  # ours
    return config


def lppo(config: ConfigDict) -> ConfigDict:
    """Changes `config` to the paper's settings of L-PPO that are the same for all model families, and returns it."""
    config.algorithm = "lppo"
    config.lppo.exits = "per_example"  # ours: an exit for each sequence (paper: one layer per run, or sampled layers)
    config.lppo.iterations = 94  # ours: 94 x 64 sequences are three passes over RedTeam-2K
    config.lppo.max_new_tokens = 128  # TRL <= 0.11
    # ours: with TRL's 10,000 sequences the coefficient stays between 0.887 and 1.128 times its start over the whole
    # run, which is nearly fixed. With 1,000 it can reach 0.30 or 3.3 times its start.
    config.lppo.kl_horizon = 1000.0
    # Guards against a policy that diverges, all ours. A step that exceeds target_kl or max_ratio is not applied, and
    # the remaining updates on its rollout are skipped.
    config.lppo.dual_clip = 3.0  # Ye et al. 2020
    # Nats per token. On the organism a step with 0.18 reduced utility, and a diverging policy reached 23. A token whose
    # ratio is at the edge of clip_range (0.2) contributes 0.02.
    config.lppo.target_kl = 0.1
    # During the updates on one rollout a rare token may well become ten times as likely, but not a hundred times.
    config.lppo.max_ratio = 100.0
    config.optimizer.learning_rate = 1e-5  # ours (TRL: 1.41e-5)
    config.lora.rank = 64  # Rewards-in-Context's PPO, the source of the reward model
    config.lora.alpha = 128.0  # as above
    config.export.form = "both"  # ours: the merged model, and a PEFT adapter
    return config


def mixed(config: ConfigDict) -> ConfigDict:
    """Changes `config` of L-PPO to train on rows of all three kinds, not only the paper's forbidden ones; returns it.

    All of this is ours. The test sets use photographs of MS-COCO's val2014, so the additional rows come from train2014.
    Requests to describe a photograph serve as benign rows. A file of your own, with requests that only sound harmful,
    is better.
    """
    config.data.train = " + ".join(
        (
            config.data.train,
            "captions:captions_train2014.json?images=train2014&limit=2000",
            "vqa_v2:.?split=train2014&images=train2014&limit=2000",
        )
    )
    config.data.mixture = {"forbidden": 0.5, "benign": 0.2, "vqa": 0.3}  # as on the embedded organism
    # The paper's reward model was trained for harmlessness alone, so it may prefer to refuse a benign request.
    config.reward.by_kind = {"forbidden": "reward_model", "benign": "none", "vqa": "exact_match"}
    config.reward.normalise = True  # the reward model's scale would drown the exact-match rewards (0 or 1)
    return config


def best(config: ConfigDict) -> ConfigDict:
    """Changes `config` of L-PPO to the method that docs/methods.md recommends, and returns it.

    It is L-SFT on rows of all three kinds, with as many iterations as L-PPO has. No published model was trained so.
    """
    config = mixed(config)
    config.algorithm = "lsft"
    config.lsft.iterations = config.lppo.iterations
    config.lsft.exits = "stratified"  # as on the embedded organism
    return config


def sweep(config: ConfigDict) -> ConfigDict:
    """Changes `config` to the settings that all sweeps over all exits share, and returns it."""
    config.sweep.exits = "all"  # paper
    config.sweep.temperature = 0.0  # ours: greedy, one response per prompt (paper: one)
    return config


def miniature(config: ConfigDict, model: str, exits: tuple[int, ...]) -> ConfigDict:
    """Changes `config` to use `icet_jax.miniatures`: tiny random networks and data sets; returns it.

    Such a run shows that every step of the experiment works. Its results mean nothing.

    Args:
      config: the experiment at full size.
      model: name of the miniature model, of the same family.
      exits: exits to sweep.
    """
    config.model.checkpoint = f"toy:{model}"
    config.model.dtype = "float32"
    config.data.train = "toy:redteam_2k"
    config.data.batch_size = 8
    config.data.max_prompt_tokens = 96
    config.lora.rank = 4
    config.lora.alpha = 8.0
    config.lppo.iterations = 2
    config.lppo.epochs = 2
    config.lppo.minibatches = 2
    config.lppo.accumulation = 2
    config.lppo.max_new_tokens = 8
    config.lsft.iterations = 2
    config.ldistill.iterations = 2
    config.lrloo.iterations = 2
    config.ldpo.iterations = 2
    for name in config.scorers:
        definition = dict(config.scorers[name])
        if "checkpoint" in definition:
            definition |= {"checkpoint": f"toy:{name}", "dtype": "float32", "batch_size": 4}
        config.scorers[name] = definition
    config.sweep.datasets = {name: f"toy:{name}" for name in ("custom", "mini_jailbreakv", "advbench_coco", "xstest")}
    config.sweep.utility = {"vqa_v2": "toy:vqa_v2"}
    config.sweep.exits = exits
    config.sweep.limit = 4
    config.sweep.batch_size = 4
    config.sweep.max_new_tokens = 8
    config.checkpoint.every = 1
    return config
