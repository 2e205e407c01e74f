"""The names that a config may contain: choices of fields, kinds of scorers, algorithms and model families.

This module imports neither jax nor the modules that implement a name, so that a wrong name is reported at once. The
modules are imported where they are used.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

BASELINES = ("rollout", "exit_kind")
DISTILLED_ON = ("policy", "default")
DTYPES = ("float32", "bfloat16")
GROUP_ADVANTAGES = ("rloo", "grpo")
KINDS = ("forbidden", "benign", "vqa")
KL_KINDS = ("k1", "k2", "k3")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REMATS = ("none", "dots", "full")
TOO_LONG = ("drop", "stop")
INSTABILITIES = ("stop", "skip")
REWARDS = ("reward_model", "exact_match", "none")
LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine")
TEMPLATES = ("vicuna_v1", "llava_v1")
TRAINED = {"language": ("policy",), "projector": ("projector",), "both": ("policy", "projector")}
"""{what `config.lsft.train` may name: the parts of `TrainState.trainable` that it trains}."""
EXIT_RULES = ("E1", "E2", "E5")  # Llama 3.2 Vision: what the projector gets at exit l
CAPTURES = ("input", "output")  # Llama 3.2 Vision: whether a capture is a block's input or its output
EXPORT_FORMS = ("full", "adapter", "both")
BEST_IS = ("highest", "lowest")
NETWORK_FIELDS: dict[str, type] = {
    "checkpoint": str,  # Hugging Face directory or hub id
    "revision": str,  # branch, tag or commit of a hub id
    "dtype": str,  # dtype of the network, one of DTYPES
    "batch_size": int,  # rows scored at once
}
"""Further fields of every scorer that has a checkpoint."""


class FamilyName(NamedTuple):
    """One family of vision-language models: a folder of `icet_jax.models` and an entry of `FAMILIES`.

    Attributes:
      title: usual name of the family.
      module: the package that describes the family in `FAMILY`.
      architecture: HF class of the family.
    """

    title: str
    module: str
    architecture: str


FAMILIES = {
    "llava": FamilyName("LLaVA-1.5", "icet_jax.models.llava", "LlavaForConditionalGeneration"),
    "llava_next": FamilyName("LLaVA-NeXT", "icet_jax.models.llava_next", "LlavaNextForConditionalGeneration"),
    "mllama": FamilyName("Llama 3.2 Vision", "icet_jax.models.mllama", "MllamaForConditionalGeneration"),
    "smolvlm": FamilyName("SmolVLM", "icet_jax.models.smolvlm", "SmolVLMForConditionalGeneration"),
    "idefics3": FamilyName("Idefics3", "icet_jax.models.smolvlm", "Idefics3ForConditionalGeneration"),
    "qwen2_5_vl": FamilyName("Qwen2.5-VL", "icet_jax.models.qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
}
"""{`model_type` in a checkpoint's config.json: that family}."""

DECODERS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""{`model_type` of a decoder: beginning of its HF classes, `...ForCausalLM` and `...ForSequenceClassification`}.

`icet_jax.checkpoints.decoders` defines how each decoder is read."""

LANGUAGE_MODELS = (
    *(f"{name}ForCausalLM" for name in DECODERS.values()),
    *(family.architecture for family in FAMILIES.values()),
)
"""HF classes of language models that can be judges. Vision-language models among them judge text without images."""


class ScorerName(NamedTuple):
    """One kind of scorer: a file of `icet_jax.scorers` and an entry of `SCORERS`.

    Attributes:
      module: the module whose function `make_scorer` creates a scorer of this kind.
      fields: {field: type} of the kind's settings in `config.scorers`, without the fields of every checkpoint.
      architectures: Hugging Face classes that the checkpoint may have; empty if this kind has no checkpoint.
    """

    module: str
    fields: dict[str, type]
    architectures: tuple[str, ...] = ()

    @property
    def all_fields(self) -> dict[str, type]:
        """{field: type} of all settings of this kind, with the fields of every checkpoint if it has one."""
        return {**self.fields, **(NETWORK_FIELDS if self.architectures else {})}


_CHAT_FIELDS: dict[str, type] = {
    "endpoint": str,  # URL before "/chat/completions"
    "model": str,  # the endpoint's name of the model
    "template": str,  # text with {prompt} and {response}, or the name of a built-in text
    "unsafe": str,  # word with which the judge calls a response unsafe
    "safe": str,  # word with which the judge calls a response safe
    "max_new_tokens": int,  # largest number of tokens of the judge's answer
    "timeout": float,  # seconds for one request, from the connection to the last byte
    "retries": int,  # number of retries of one request after a temporary failure
    "requests_per_second": float,  # limit for all processes together
    "key_variable": str,  # environment variable that holds the key; without it no key is sent
}
SCORERS = {
    "refusal_keywords": ScorerName("icet_jax.scorers.keywords", {}),
    "llama_guard": ScorerName(
        "icet_jax.scorers.decoder_judge", {"template": str, "max_new_tokens": int}, ("LlamaForCausalLM",)
    ),
    "qwen3_guard": ScorerName(
        "icet_jax.scorers.decoder_judge",
        {"template": str, "controversial": str, "max_new_tokens": int},
        ("Qwen3ForCausalLM",),
    ),
    "decoder_judge": ScorerName(
        "icet_jax.scorers.decoder_judge",
        {"template": str, "unsafe": str, "safe": str, "max_new_tokens": int},
        LANGUAGE_MODELS,
    ),
    "reward_model": ScorerName(
        "icet_jax.scorers.reward_model",
        {"template": str},
        (
            "GPT2ForSequenceClassification",
            "DebertaV2ForSequenceClassification",
            *(f"{name}ForSequenceClassification" for name in DECODERS.values()),
        ),
    ),
    "toxicity": ScorerName(
        "icet_jax.scorers.toxicity",
        {"heads": tuple},
        ("BertForSequenceClassification", "RobertaForSequenceClassification"),
    ),
    "chat": ScorerName("icet_jax.scorers.chat", _CHAT_FIELDS),
    "ensemble": ScorerName("icet_jax.scorers.ensemble", {"members": dict}),
}
"""{`kind` of an entry of `config.scorers`: that kind of scorer}."""


class AlgorithmName(NamedTuple):
    """One training algorithm: a file of `icet_jax.algorithms`, an entry of `ALGORITHMS` and a section of the config.

    Attributes:
      title: name of the algorithm in reports.
      about: what the algorithm does, in half a sentence.
      module: the module that implements the algorithm, whose `ALGORITHM` is its class.
      rewarded: whether it needs `config.reward`, because it learns from scored responses.
      samples: function that takes the algorithm's config section and returns whether the responses trained on are
        generated by the model itself during training, rather than read from the data set.
      equation: the loss, in the notation of its module's docstring.
      traits: function of its config section, as a mapping, that returns the phrases that its name in reports needs
        beside `title` and the exit schedule.
      main_fields: the fields of its config section that reports list; empty means all.
    """

    title: str
    about: str
    module: str
    rewarded: bool = False
    samples: Callable[[Any], bool] = lambda section: True
    equation: str = ""
    traits: Callable[[Mapping[str, Any]], Sequence[str]] = lambda section: ()
    main_fields: tuple[str, ...] = ()


_TRAINED_WORDS = {"projector": ("the projector alone",), "both": ("projector and language model",)}
_DISTILLED_ANSWERS = {"policy": "policy's", "default": "default exit's"}
ALGORITHMS = {
    "lppo": AlgorithmName(
        title="L-PPO",
        about="Clip-PPO whose policy, reference and value are conditioned on the sampled exit",
        module="icet_jax.algorithms.lppo",
        rewarded=True,
        equation="L = E[max(-K A, -clip(K, 1 - eps, 1 + eps) A)] + c1 E[(V - returns)^2], "
        "K = pi(y_t | P(e_l), x, y_<t) / pi_old(y_t | P(e_l), x, y_<t)",
        main_fields=(
            "iterations",
            "exits",
            "fixed_exit",
            "train_exits",
            "epochs",
            "minibatches",
            "temperature",
            "max_new_tokens",
            "kl_coef",
            "kl_kind",
            "kl_adaptive",
            "kl_coef_by_kind",
            "anchor_coef",
            "clip_range",
            "gamma",
            "lam",
            "value_coef",
            "baseline",
            "target_kl",
            "max_ratio",
            "dual_clip",
        ),
    ),
    "lsft": AlgorithmName(
        title="L-SFT",
        about="supervised refusals at sampled exits",
        module="icet_jax.algorithms.lsft",
        samples=lambda section: False,
        equation="L = -E_t[log pi(y_t | P(e_l), x, y_<t)]",
        traits=lambda section: _TRAINED_WORDS.get(str(section.get("train")), ()),
    ),
    "ldistill": AlgorithmName(
        title="L-Distill",
        about="the default exit's distribution of the model before training, learnt at sampled exits",
        module="icet_jax.algorithms.ldistill",
        samples=lambda section: section.on == "policy",
        equation="L = E_t[KL(pi_ref(. | P(e_default), x, y_<t) || pi(. | P(e_l), x, y_<t))]",
        traits=lambda section: [f"on the {_DISTILLED_ANSWERS.get(str(section.get('on')), section.get('on'))} answers"],
    ),
    "lrloo": AlgorithmName(
        title="L-RLOO",
        about="several responses at one sampled exit compared with each other, without a value head",
        module="icet_jax.algorithms.lrloo",
        rewarded=True,
        equation="L = E_it[max(-K_it A_i, -clip(K_it, 1 - eps, 1 + eps) A_i)], A_i = R_i - mean over j != i of R_j "
        "(grpo: A_i = (R_i - mean(R)) / std(R))",
        traits=lambda section: [
            *(["GRPO's advantage"] if section.get("advantage") == "grpo" else []),
            f"groups of {section.get('group_size')}",
        ],
    ),
    "ldpo": AlgorithmName(
        title="L-DPO",
        about="the default exit's refusals preferred to the compliance of sampled exits",
        module="icet_jax.algorithms.ldpo",
        samples=lambda section: False,
        equation="L = -E[log sigmoid(beta log(pi / pi_ref)(y+ | P(e_l), x) - beta log(pi / pi_ref)(y- | P(e_l), x))] "
        "- c E[log pi(y+ | P(e_l), x) / |y+|]",
        traits=lambda section: ["no SFT term"] if section.get("sft_coef") == 0 else [],
    ),
}
"""{value of `config.algorithm`: that algorithm}; its settings are the config section of the same name."""


class ExitScheduleName(NamedTuple):
    """One way to sample exits: a class of `icet_jax.algorithms.exits` and an entry of `EXIT_SCHEDULES`.

    Attributes:
      path: dotted path of the class.
      learns: whether its probabilities depend on the answers of the model in training.
      title: phrase for it in the names of methods in reports.
    """

    path: str
    learns: bool = False
    title: str = ""


EXIT_SCHEDULES = {
    "fixed": ExitScheduleName("icet_jax.algorithms.exits.Fixed", title="one exit alone"),
    "per_batch": ExitScheduleName("icet_jax.algorithms.exits.PerBatch", title="one exit per batch"),
    "per_example": ExitScheduleName("icet_jax.algorithms.exits.PerExample", title="one exit per row"),
    "stratified": ExitScheduleName("icet_jax.algorithms.exits.Stratified", title="stratified exits"),
    "adaptive": ExitScheduleName("icet_jax.algorithms.exits.Adaptive", learns=True, title="adaptive exits"),
}
"""{value of `exits` in an algorithm's config section: that exit schedule}."""
