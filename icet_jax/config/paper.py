"""The paper's experiment on LLaVA-1.5, as both of its configs share it; and the same on miniatures of everything.

Origins: *paper* is the ICML 2025 text, *cards* the model cards of the checkpoints, *ours* this project's own choice.
"""

from ml_collections import ConfigDict

from icet_jax.config.defaults import default

SIZES = ("7b", "13b")


def llava15(size: str = "7b") -> ConfigDict:
    """LLaVA-1.5 (`size` "7b" or "13b") on the paper's data sets with the paper's scorers.

    The published files are yours to bring (none may be shipped): put them into one folder, `config.data.root`.
    """
    config = default()
    config.model.checkpoint = f"llava-hf/llava-1.5-{size}-hf"  # paper (7B); ours (13B)

    # RedTeam-2K's 2,000 prompts, each with a benign image (paper) drawn from MS-COCO's validation set (ours).
    config.data.train = "redteam_2k:RedTeam_2K.csv?images=val2014"
    # The paper's reward model, cited there by the work that released it.
    config.reward.model = "harmless_reward"
    config.reward.by_kind = {"forbidden": "reward_model", "benign": "reward_model", "vqa": "exact_match"}

    config.scorers = {
        # paper: ASR by Llama Guard, which it does not version; both are offered, the first is its contemporary.
        "llama_guard_1": {"kind": "llama_guard", "checkpoint": "meta-llama/LlamaGuard-7b", "dtype": "bfloat16"},
        "llama_guard_3": {"kind": "llama_guard", "checkpoint": "meta-llama/Llama-Guard-3-8B", "dtype": "bfloat16"},
        # ours: a second opinion from another lab; yes = harmful (cards).
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
        "perspective": {"kind": "perspective", "attributes": ("TOXICITY",)},  # paper; needs PERSPECTIVE_API_KEY
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


def miniature(config: ConfigDict) -> ConfigDict:
    """`config` on `icet_jax.runs.toy`: every network of toy size with random weights, every set in its own format.

    Nothing that comes out of it means anything; it shows that every step of the experiment runs.
    """
    config.model.checkpoint = "toy:llava15"
    config.model.dtype = "float32"
    config.data.train = "toy:redteam_2k"
    config.data.batch_size = 8
    config.data.max_prompt_tokens = 64
    config.lora.rank = 4
    config.lora.alpha = 8.0
    config.lppo.iterations = 2
    config.lppo.epochs = 2
    config.lppo.minibatches = 2
    config.lppo.accumulation = 2
    config.lppo.max_new_tokens = 8
    config.lsft.iterations = 2
    for name in config.scorers:
        definition = dict(config.scorers[name])
        if "checkpoint" in definition:
            definition |= {"checkpoint": f"toy:{name}", "dtype": "float32", "batch_size": 4}
        if definition["kind"] == "perspective":
            definition["endpoint"] = "toy:perspective"
        config.scorers[name] = definition
    config.sweep.datasets = {name: f"toy:{name}" for name in ("custom", "mini_jailbreakv", "advbench_coco", "xstest")}
    config.sweep.utility = {"vqa_v2": "toy:vqa_v2"}
    config.sweep.exits = (1, 12, 23)
    config.sweep.limit = 4
    config.sweep.batch_size = 4
    config.sweep.max_new_tokens = 8
    config.checkpoint.every = 1
    return config
