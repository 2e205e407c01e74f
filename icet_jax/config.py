"""Every setting: its default, its unit, where it comes from and what is allowed.

A file in `configs/` builds on `default()`, changes what its experiment changes and returns the result from
`get_config(variant)`; `icet_jax.runs.config_files.load` finds that file, applies the command line's overrides and
checks the outcome. Nothing here imports jax, so a wrong field or value is named at once.

Origins: *paper* is the ICML 2025 text; *TRL* the defaults of TRL <= 0.11, whose formulas the paper's match; *RiC* is
Rewards-in-Context's PPO, the source of the reward model; *ours* is this project's own choice.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from icet_jax.errors import UserError

ALGORITHMS = ("lppo", "lsft")
DTYPES = ("float32", "bfloat16")
EXIT_SCHEDULES = ("fixed", "per_batch", "per_example", "stratified")
KINDS = ("forbidden", "benign", "vqa")
KL_KINDS = ("k1", "k2", "k3")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REMATS = ("none", "dots", "full")
REWARDS = ("reward_model", "exact_match", "none")
SCHEDULES = ("constant", "linear", "cosine")

# Fields whose own keys the user chooses.
OPEN_FIELDS = ("data.mixture", "reward.by_kind", "sweep.datasets", "sweep.utility")


def default() -> ConfigDict:
    """The defaults, locked: L-PPO on a LLaVA-1.5-sized model as the paper describes it."""
    config = ConfigDict()
    config.algorithm = "lppo"  # "lppo", or "lsft": supervised refusals at sampled exits (the ablation; ours)
    config.seed = 0  # drives exits, sampling, data order, adapters
    config.seeds = ()  # several: one run each under workdir/seed_K, and one report over all
    config.model = _model()
    config.mesh = _mesh()
    config.lora = _lora()
    config.data = _data()
    config.reward = _reward()
    config.lppo = _lppo()
    config.lsft = _lsft()
    config.optimizer = _optimizer()
    config.sweep = _sweep()
    config.log = _log()
    config.checkpoint = _checkpoint()
    return config.lock()


def organism() -> ConfigDict:
    """What the experiments on the embedded organism share (all ours; docs tell how they were found)."""
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
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "cosine"
    config.sweep.datasets = {"forbidden": "organism:test:forbidden", "benign": "organism:test:benign:1024"}
    config.sweep.utility = {"vqa": "organism:test:vqa"}
    config.sweep.max_new_tokens = 16
    config.sweep.batch_size = 128
    config.sweep.scorers = ("refusal_keywords", "organism:judge", "organism:reward_model")
    return config


def _model() -> ConfigDict:
    model = ConfigDict()
    model.checkpoint = config_dict.placeholder(str)  # HF directory or hub id, or "organism:vlm"; needed by every run
    model.dtype = "bfloat16"  # compute; norms, softmax, log-probs, adapters and optimizer stay float32 (ours)
    model.remat = "full"  # what the backward pass recomputes: "none", "dots" (keep matmuls), "full"
    return model


def _mesh() -> ConfigDict:
    mesh = ConfigDict()  # devices along each axis; -1, once, takes the rest
    mesh.data = -1
    mesh.fsdp = 1
    mesh.tensor = 1
    return mesh


def _lora() -> ConfigDict:
    lora = ConfigDict()
    lora.rank = 64  # RiC; 0 trains the whole language model, with a frozen copy as the reference
    lora.alpha = 128.0  # RiC; updates are scaled by alpha / rank
    lora.targets = PROJECTIONS  # decoder projections that get an adapter (ours: all)
    return lora


def _data() -> ConfigDict:
    data = ConfigDict()
    data.train = config_dict.placeholder(str)  # .csv or .jsonl of (prompt, image[, kind, answer]), or "organism:train"
    data.mixture = ConfigDict({"forbidden": 1.0})  # share of each kind of row; paper: harmful prompts alone
    data.batch_size = 64  # sequences per rollout; TRL
    data.max_prompt_tokens = 768  # positions of the prompt bucket, image positions (576 in LLaVA-1.5) included; ours
    data.image_root = config_dict.placeholder(str)  # folder of relative image paths; unset: beside the data file
    return data


def _reward() -> ConfigDict:
    reward = ConfigDict()
    # HF directory or hub id of a GPT-2 sequence classifier, or "organism:reward_model".
    reward.model = config_dict.placeholder(str)
    # What rewards a row of each kind. A text-only reward model cannot grade an answer about an image.
    reward.by_kind = ConfigDict({"forbidden": "reward_model", "benign": "reward_model", "vqa": "exact_match"})
    reward.normalise = False  # reward-model scores minus their running mean, over their standard deviation; TRL: off
    reward.clip = 0.0  # scores are clipped to +-clip after normalising; 0 = off, as in TRL
    reward.missing_eos_penalty = 0.0  # subtracted from the score of a response without EOS; 0 = off, as in TRL
    return reward


def _lppo() -> ConfigDict:
    lppo = ConfigDict()
    lppo.iterations = 94  # rollouts; 94 x 64 sequences is three passes over RedTeam-2K (ours)
    lppo.exits = "per_example"  # "fixed" (the paper's text), "per_batch", "per_example", "stratified"
    lppo.fixed_exit = config_dict.placeholder(int)  # the exit of "fixed", 1..num_exits; unset: the default exit
    lppo.kl_coef = 0.2  # initial coefficient of the KL term, per nat; TRL
    lppo.kl_kind = "k1"  # per-token estimator: d, d^2/2 or exp(-d)-1+d; TRL: k1
    lppo.kl_adaptive = True  # TRL: the coefficient follows kl_target
    lppo.kl_target = 6.0  # nats per sequence; TRL
    lppo.kl_horizon = 10000.0  # sequences; TRL
    lppo.gamma = 1.0  # discount; TRL
    lppo.lam = 0.95  # GAE's lambda; TRL
    lppo.clip_range = 0.2  # the paper's epsilon; value from TRL
    lppo.value_clip_range = 0.0  # 0 = off: the paper's value loss is the plain squared error
    lppo.value_coef = 0.1  # the paper's c1; value from TRL
    lppo.value_stop_gradient = False  # True: the value head learns on fixed features (ours)
    lppo.whiten_advantages = True  # over the whole rollout batch, masked; TRL
    lppo.whiten_rewards = False  # TRL
    lppo.epochs = 4  # passes over one rollout; TRL
    lppo.minibatches = 1  # optimizer steps per epoch; TRL: one
    lppo.accumulation = 8  # slices of a mini-batch whose gradients are summed; ours, for memory
    lppo.target_kl = 0.0  # approximate KL per token at which the remaining updates of a rollout are skipped; 0 = off
    lppo.temperature = 1.0  # of rollouts, and of every log-prob after them; *ours*, as in TRL
    lppo.max_new_tokens = 128  # TRL
    lppo.log_prob_chunk = 16  # response positions whose logits exist at once; ours, for memory
    lppo.entropy_coef = 0.0  # entropy bonus; 0 = off
    return lppo


def _lsft() -> ConfigDict:
    lsft = ConfigDict()
    lsft.iterations = 94  # batches; epochs, mini-batches and max_new_tokens are lppo's: the same budget (ours)
    lsft.refusal = "I'm sorry, but I can't help with that."  # target of forbidden rows; others learn their answer
    lsft.exits = "per_example"  # as lppo.exits
    return lsft


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()  # AdamW
    optimizer.learning_rate = 1e-5  # peak; TRL
    optimizer.schedule = "constant"  # after the warm-up: "constant", "linear" or "cosine" to zero; TRL: constant
    optimizer.warmup_steps = 0  # optimizer steps from 0 to the peak
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.0  # TRL uses Adam without decay
    optimizer.max_grad_norm = 1.0  # global norm; 0 = off (ours)
    return optimizer


def _sweep() -> ConfigDict:
    sweep = ConfigDict()
    sweep.exits = config_dict.FieldReference("all", field_type=object)  # "all", or a tuple such as (1, 12, 23)
    sweep.datasets = ConfigDict()  # {name: source}: forbidden and benign rows, at every exit, before and after
    sweep.utility = ConfigDict()  # {name: source}: rows with an answer (VQA), before and after
    sweep.limit = config_dict.placeholder(int)  # rows of each source; unset: all
    sweep.batch_size = 32  # rows generated at once
    sweep.max_new_tokens = 128
    sweep.temperature = 0.0  # 0 = greedy; paper.md: one generation per prompt
    sweep.top_k = 0  # 0 = off; needs a temperature
    sweep.top_p = 1.0  # 1 = off; needs a temperature
    sweep.scorers = ("refusal_keywords",)  # what judges a response, side by side: names or scorer checkpoints
    sweep.reveal_unsafe = False  # True: the report shows responses that a judge called unsafe
    return sweep


def _log() -> ConfigDict:
    log = ConfigDict()
    log.every = 1  # iterations between rows of metrics.jsonl
    log.tensorboard = True  # events.* beside metrics.jsonl
    log.wandb = False  # needs the `wandb` extra
    return log


def _checkpoint() -> ConfigDict:
    checkpoint = ConfigDict()
    checkpoint.every = 10  # iterations between complete checkpoints; the last iteration is always one
    checkpoint.keep = 2  # newest checkpoints kept
    return checkpoint


_Rule = tuple[Callable[[Any], bool], str]
_POSITIVE: _Rule = (lambda v: v > 0, "above 0")
_NOT_NEGATIVE: _Rule = (lambda v: v >= 0, "0 or more")
_SHARE: _Rule = (lambda v: 0 <= v <= 1, "between 0 and 1")
_DECAY: _Rule = (lambda v: 0 <= v < 1, "at least 0 and below 1")


def _one_of(choices: tuple[str, ...]) -> _Rule:
    return (lambda v: v in choices, "one of " + ", ".join(choices))


def _distinct_subset(choices: tuple[str, ...]) -> _Rule:
    return (
        lambda v: len(v) > 0 and len(set(v)) == len(v) and set(v) <= set(choices),
        "distinct names out of " + ", ".join(choices),
    )


_RULES: dict[str, _Rule] = {
    "algorithm": _one_of(ALGORITHMS),
    "seed": (lambda v: 0 <= v < 2**32, "between 0 and 2^32 - 1"),
    "seeds": (
        lambda v: all(type(s) is int and 0 <= s < 2**32 for s in v) and len(set(v)) == len(v),
        "distinct whole numbers between 0 and 2^32 - 1",
    ),
    "model.dtype": _one_of(DTYPES),
    "model.remat": _one_of(REMATS),
    "mesh.data": (lambda v: v == -1 or v > 0, "-1 or above 0"),
    "mesh.fsdp": (lambda v: v == -1 or v > 0, "-1 or above 0"),
    "mesh.tensor": (lambda v: v == -1 or v > 0, "-1 or above 0"),
    "lora.rank": _NOT_NEGATIVE,
    "lora.alpha": _POSITIVE,
    "lora.targets": _distinct_subset(PROJECTIONS),
    "data.batch_size": _POSITIVE,
    "data.max_prompt_tokens": _POSITIVE,
    "reward.clip": _NOT_NEGATIVE,
    "reward.missing_eos_penalty": _NOT_NEGATIVE,
    "lppo.iterations": _NOT_NEGATIVE,
    "lppo.exits": _one_of(EXIT_SCHEDULES),
    "lppo.fixed_exit": (lambda v: v >= 1, "an exit's number, from 1"),
    "lppo.kl_coef": _NOT_NEGATIVE,
    "lppo.kl_kind": _one_of(KL_KINDS),
    "lppo.kl_target": _POSITIVE,
    "lppo.kl_horizon": _POSITIVE,
    "lppo.gamma": _SHARE,
    "lppo.lam": _SHARE,
    "lppo.clip_range": _POSITIVE,
    "lppo.value_clip_range": _NOT_NEGATIVE,
    "lppo.value_coef": _NOT_NEGATIVE,
    "lppo.epochs": _POSITIVE,
    "lppo.minibatches": _POSITIVE,
    "lppo.accumulation": _POSITIVE,
    "lppo.target_kl": _NOT_NEGATIVE,
    "lppo.temperature": _POSITIVE,
    "lppo.max_new_tokens": _POSITIVE,
    "lppo.log_prob_chunk": _POSITIVE,
    "lppo.entropy_coef": _NOT_NEGATIVE,
    "lsft.iterations": _NOT_NEGATIVE,
    "lsft.refusal": (lambda v: bool(v.strip()), "a sentence"),
    "lsft.exits": _one_of(EXIT_SCHEDULES),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.schedule": _one_of(SCHEDULES),
    "optimizer.warmup_steps": _NOT_NEGATIVE,
    "optimizer.b1": _DECAY,
    "optimizer.b2": _DECAY,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.max_grad_norm": _NOT_NEGATIVE,
    "sweep.exits": (
        lambda v: v == "all" or (type(v) is tuple and len(v) > 0 and all(type(e) is int and e >= 1 for e in v)),
        '"all" or exits\' numbers, from 1, such as 1,12,23',
    ),
    "sweep.limit": _POSITIVE,
    "sweep.batch_size": _POSITIVE,
    "sweep.max_new_tokens": _POSITIVE,
    "sweep.temperature": _NOT_NEGATIVE,
    "sweep.top_k": _NOT_NEGATIVE,
    "sweep.top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "sweep.scorers": (lambda v: len(v) > 0 and all(isinstance(s, str) for s in v), "at least one scorer"),
    "log.every": _POSITIVE,
    "checkpoint.every": _POSITIVE,
    "checkpoint.keep": _POSITIVE,
}


def check(config: ConfigDict) -> None:
    """Validates every value that can be judged without the model.

    Raises:
      UserError: names the first field that is unknown, missing, of the wrong type or out of range, and what it may be.
    """
    values, known = flatten(config), flatten(default())
    for name in values:
        if name not in known:
            raise unknown_field(name)
    for name, reference in known.items():
        if name not in values:
            raise UserError(f"config.{name} is missing: the config replaced its section; change single fields instead")
        _check_type(name, values[name], reference)
        if name in _RULES and values[name] is not None:
            allowed, says = _RULES[name]
            if not allowed(values[name]):
                raise UserError(f"config.{name} is {values[name]!r}, but must be {says}")
    _check_open(values)
    _check_together(config)


def check_exits(config: ConfigDict, num_exits: int) -> None:
    """Raises a `UserError` where the config names an exit that the model does not have (exits are 1..num_exits)."""
    exits = [("lppo.fixed_exit", config.lppo.fixed_exit)] if config.lppo.fixed_exit is not None else []
    if config.sweep.exits != "all":
        exits += [("sweep.exits", number) for number in config.sweep.exits]
    for name, number in exits:
        if number > num_exits:
            raise UserError(f"config.{name} names exit {number}, but this model's exits are 1 to {num_exits}")


TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list such as 1,2,3",
    ConfigDict: "a dict such as {'a': 1}",
    dict: "a dict such as {'a': 1}",
}


def _check_type(name: str, value: Any, reference: Any) -> None:
    """Numbers may be written as whole numbers; placeholders (reference None) carry their type in the ConfigDict."""
    if reference is None or name == "sweep.exits" or name in OPEN_FIELDS:
        return
    accepted = (int, float) if type(reference) is float else (type(reference),)
    if type(value) not in accepted or value != value:
        raise UserError(f"config.{name} is {value!r}, but must be {TYPE_NAMES[type(reference)]}")


def _check_open(values: Mapping[str, Any]) -> None:
    mixture = values["data.mixture"]
    for kind, share in mixture.items():
        if kind not in KINDS:
            raise UserError(f"config.data.mixture.{kind}: a row is one of {', '.join(KINDS)}{_nearest(kind, KINDS)}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < float("inf"):
            raise UserError(f"config.data.mixture.{kind} is {share!r}, but must be a share, 0 or more")
    if sum(mixture.values()) <= 0:
        raise UserError("config.data.mixture leaves no rows: give at least one kind a share above 0")
    for kind, reward in values["reward.by_kind"].items():
        if kind not in KINDS:
            raise UserError(f"config.reward.by_kind.{kind}: a row is one of {', '.join(KINDS)}{_nearest(kind, KINDS)}")
        if reward not in REWARDS:
            raise UserError(f"config.reward.by_kind.{kind} is {reward!r}, but must be one of {', '.join(REWARDS)}")
    for kind, share in mixture.items():
        if share > 0 and kind not in values["reward.by_kind"]:
            raise UserError(f"config.reward.by_kind.{kind} is missing: config.data.mixture draws {kind} rows")
    for field in ("sweep.datasets", "sweep.utility"):
        for name, source in values[field].items():
            if not isinstance(source, str) or not source:
                raise UserError(f"config.{field}.{name} is {source!r}, but must be a file or an organism: source")
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise UserError(f"config.{field}: {name!r} names a file; use letters, digits, _ and - alone")


def _check_together(config: ConfigDict) -> None:
    lppo, batch = config.lppo, config.data.batch_size
    if batch % (lppo.minibatches * lppo.accumulation):
        raise UserError(
            f"config.data.batch_size {batch} does not divide into {lppo.minibatches} mini-batches (lppo.minibatches) "
            f"of {lppo.accumulation} slices (lppo.accumulation)"
        )
    if config.sweep.temperature == 0 and (config.sweep.top_k or config.sweep.top_p < 1):
        raise UserError("config.sweep.top_k and top_p need config.sweep.temperature above 0 (0 is greedy)")
    if [config.mesh.data, config.mesh.fsdp, config.mesh.tensor].count(-1) > 1:
        raise UserError("config.mesh: only one axis may be -1 (take the remaining devices)")
    both = set(config.sweep.datasets) & set(config.sweep.utility)
    if both:
        raise UserError(f"config.sweep.datasets and config.sweep.utility both name {sorted(both)[0]!r}; rename one")


def require(config: ConfigDict, *names: str) -> None:
    """Raises a `UserError` naming the first of `names` (dotted) that is unset or empty."""
    values = flatten(config)
    for name in names:
        if values[name] in (None, "") or (name in OPEN_FIELDS and not values[name]):
            raise UserError(f"config.{name} is not set: give it in the config file or as --config.{name}=...")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{dotted name: value}; an open field (its keys are the user's) is one plain dict."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: ConfigDict) -> None:
        for key in node:
            name, value = f"{prefix}{key}", node[key]
            if name in OPEN_FIELDS:
                flat[name] = value.to_dict() if isinstance(value, ConfigDict) else value
            elif isinstance(value, ConfigDict):
                visit(f"{name}.", value)
            else:
                flat[name] = value

    visit("", config)
    return flat


def choose_variant(variant: str, allowed: tuple[str, ...]) -> str:
    """`variant` itself, for a config file's `get_config`; a `UserError` names the variants that the file has."""
    if variant in ("", *allowed):
        return variant
    raise UserError(f"variant {variant!r}: this config has {', '.join(allowed) or 'none'}{_nearest(variant, allowed)}")


def unknown_field(name: str) -> UserError:
    """An unknown field, with the nearest known one: by the whole dotted name, or by its last part."""
    known = list(flatten(default()))
    candidates = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not candidates or "." not in name:
        leaves = {field.rpartition(".")[2]: field for field in reversed(known)}
        candidates = [
            leaves[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], leaves, n=1)
        ] or candidates
    hint = f"; the nearest is config.{candidates[0]}" if candidates else "; see icet_jax/config.py for every field"
    return UserError(f"config.{name} is not a field{hint}")


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
