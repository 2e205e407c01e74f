"""Every setting, declared once: its default, meaning, unit, origin and what it may be.

`CONFIG` is the declaration. The config itself, its checks, the error lines that name the nearest field and
docs/reference/config.md are all made from it.

A file in `configs/` starts from `default()`, changes what its experiment changes and returns the result from
`get_config(variant)`. `icet_jax.runs.config_files.load` finds that file, applies the overrides of the command line and
checks the outcome. Nothing here imports jax, so a wrong field or value is reported at once.

Origins: *paper* is the ICML 2025 text. *TRL* is TRL 0.11.4, the last version with this PPO, whose formulas match the
paper's. *RiC* is Rewards-in-Context's PPO, the source of the reward model. *ours* is this project's own choice.
"""

from typing import Any

from ml_collections import ConfigDict

from icet_jax.config import names
from icet_jax.config.fields import (
    AXIS,
    DECAY,
    EXIT_NUMBERS,
    NOT_NEGATIVE,
    OFF_OR_ABOVE_1,
    POSITIVE,
    SHARE,
    Field,
    Rule,
    Section,
    Table,
    Tree,
    build,
    distinct,
    holds_once,
    leaves,
    matches,
    one_of,
    unset,
)  # fmt: skip

_SHARES = Table(
    float,
    names.KINDS,
    Rule(lambda share: type(share) in (int, float) and 0 <= share < float("inf"), "a share, 0 or more"),
)
_SOURCES = Table(
    str,
    matches(r"[A-Za-z0-9_-]+", "names a file; use letters, digits, _ and - alone"),
    Rule(lambda source: isinstance(source, str) and source != "", "a file or an organism: source"),
)


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _are_exits(value: Any) -> bool:
    is_list = type(value) is tuple and len(value) > 0
    return value == "all" or (is_list and all(type(number) is int and number >= 1 for number in value))


_SEED = Rule(_is_seed, "between 0 and 2^32 - 1")
_SEEDS = Rule(
    lambda seeds: all(map(_is_seed, seeds)) and len(set(seeds)) == len(seeds),
    "distinct whole numbers between 0 and 2^32 - 1",
)
_EXITS = Rule(_are_exits, '"all" or exits\' numbers, from 1, such as 1,12,23')

# The tables below are laid out by hand: a field begins a line, and what does not fit follows on the next.
# fmt: off
MODEL = Section(
    {
        "checkpoint": unset(str, 'Hugging Face directory or hub id, or "organism:vlm". Every run needs it.'),
        "revision": unset(str, "Branch, tag or commit of a hub id. Unset: the default branch."),
        "adapter": unset(str, "PEFT directory or hub id of a LoRA to start from. It is merged when the model is "
            "loaded."),
        "exit_rule": unset(str, "What exit l feeds the projector, in a family where several readings are possible "
            "(Llama 3.2 Vision).", one_of(names.EXIT_RULES)),
        "intermediate_capture": Field("input", "What an index of Llama 3.2 Vision's captured intermediates means. "
            '"input": the state that enters that block, as the model was trained. "output": the state that leaves it, '
            "as transformers reads it since 4.56.", one_of(names.CAPTURES)),
        "dtype": Field("bfloat16", "Type of the computation. Norms, softmax, log-probs, adapters and the optimizer "
            "stay float32.", one_of(names.DTYPES), origin="ours"),
        "remat": Field("dots", 'What the backward pass computes again. "none": nothing. "dots": everything except '
            'products with weights. "full": everything, which takes the least memory.', one_of(names.REMATS)),
    }
)
MESH = Section(
    {
        "data": Field(-1, "Splits the rows of a batch.", AXIS),
        "fsdp": Field(1, "Splits the rows too, and the weights and the train state.", AXIS),
        "tensor": Field(1, "Splits the weights by columns and heads.", AXIS),
    },
    about="Devices along each axis. One axis may be -1: it takes the devices that are left.",
)
LORA = Section(
    {
        "rank": Field(64, "Rank of the adapters. 0 trains the whole language model, and a frozen copy of it is the "
            "reference.", NOT_NEGATIVE, origin="RiC"),
        "alpha": Field(128.0, "Updates are scaled by alpha / rank.", POSITIVE, origin="RiC"),
        "targets": Field(names.PROJECTIONS, "Projections of the decoder that get an adapter.",
            distinct(names.PROJECTIONS), origin="ours: all"),
    }
)
DATA = Section(
    {
        "train": unset(str, "Training rows: a .csv or .jsonl file of (prompt, image[, kind, answer]), FORMAT:PATH, "
            '"organism:train", or several of these joined by " + ".'),
        "root": unset(str, "Folder that relative paths of sources start from. Unset: the working directory."),
        "mixture": Field({"forbidden": 1.0}, "Share of each kind of row.", table=_SHARES,
            origin="paper: harmful prompts alone"),
        "batch_size": Field(64, "Sequences per rollout.", POSITIVE, unit="sequences", origin="ours (TRL: 128)"),
        "max_prompt_tokens": Field(768, "Length to which prompts are padded, image positions included (576 in "
            "LLaVA-1.5).", POSITIVE, unit="positions", origin="ours"),
        "too_long": Field("drop", "What happens to a row whose prompt does not fit max_prompt_tokens (training) or the "
            'model\'s positions (all sets). "drop": it is left out and counted. "stop": the run does not start. All '
            "rows are measured before anything is compiled.", one_of(names.TOO_LONG)),
        "directory": unset(str, "Folder to which `--mode=prepare` writes the data sets (TFDS array_record) and from "
            "which runs read them. Unset: each run reads the sources itself."),
        "template": unset(str, 'Chat template of LLaVA-1.5 and LLaVA-NeXT on Vicuna. "vicuna_v1" has the system prompt '
            'of the original LLaVA-1.5 evaluations ("a curious user"), "llava_v1" that of LLaVA-NeXT\'s model card ("a '
            'curious human"). Unset: the checkpoint\'s own. Another system prompt is another attack surface.',
            one_of(names.TEMPLATES), origin="ours"),
        "image_root": unset(str, "Folder that relative image paths start from. Unset: the folder of the data file."),
    }
)
REWARD = Section(
    {
        "model": unset(str, "A name of `config.scorers`, the Hugging Face directory or hub id of a sequence "
            'classifier, or "organism:reward_model".'),
        "by_kind": Field({"forbidden": "reward_model", "benign": "reward_model", "vqa": "exact_match"}, "What rewards "
            'a row of each kind. "none": the row learns from the KL alone. A text-only reward model cannot grade an '
            "answer about an image.", table=Table(str, names.KINDS, one_of(names.REWARDS))),
        "normalise": Field(False, "Subtract the running mean from the reward model's scores and divide them by the "
            "running standard deviation.", origin="TRL: off"),
        "clip": Field(0.0, "Scores are clipped to between -clip and clip after normalising. 0 = off.", NOT_NEGATIVE,
            origin="TRL"),
        "missing_eos_penalty": Field(0.0, "Subtracted from the score of a response without EOS. 0 = off.",
            NOT_NEGATIVE, origin="TRL"),
    }
)
RM = Section(
    {
        "train": unset(str, 'Preference pairs in HH-RLHF\'s format: .jsonl or .jsonl.gz, or "organism:train[:COUNT]".'),
        "held_out": unset(str, "Preference pairs on which the accuracy is measured. Unset: held_out_share of "
            "rm.train."),
        "held_out_share": Field(0.05, "Share of the prompts of rm.train that is held out, each prompt with all of its "
            "pairs.", Rule(lambda share: 0 < share < 1, "above 0 and below 1"), origin="ours"),
        "name": unset(str, "What metrics call the model. Unset: the name of the run directory.",
            matches(r"[a-z0-9_]+", "small letters, digits and _: it is part of metrics' names")),
        "template": unset(str, "Text with {prompt} in it. Unset: that of the paper's reward model.",
            holds_once("{prompt}")),
        "max_tokens": Field(1024, "Longest prompt and response together; at most the model's positions. GPT-2 has "
            "1024.", POSITIVE, unit="tokens"),
        "epochs": Field(1.0, "Passes over the pairs. More than one overfits.", POSITIVE,
            origin="Ouyang et al. 2022, Bai et al. 2022"),
        "batch_size": Field(64, "Pairs per optimizer step.", POSITIVE, unit="pairs", origin="Ouyang et al. 2022"),
        "accumulation": Field(8, "Slices of a batch whose gradients are averaged.", POSITIVE,
            origin="ours, for memory"),
        "length_window": Field(32, "Pairs are sorted by length within this many batches, to save padding. 1 = off.",
            POSITIVE, unit="batches", origin="ours"),
    },
    about="Settings of `--mode=reward`. Its base is `model`, its optimizer is `optimizer`; `checkpoint` and `log` "
    "count its steps.",
)
LPPO = Section(
    {
        "iterations": Field(94, "94 rollouts of 64 sequences are three passes over RedTeam-2K.", NOT_NEGATIVE,
            unit="rollouts", origin="ours"),
        "exits": Field("per_example", 'Which exit each sequence is trained at. "fixed": always fixed_exit, as in the '
            'paper\'s text. "per_batch": one draw for all rows. "per_example": one draw per row. "stratified": the '
            'rows are spread evenly over early, middle and late exits. "adaptive": an exit at which more forbidden '
            "requests are not refused is drawn more often (by the refusal keywords, over the last ten rollouts or so); "
            "every exit keeps a share.", one_of(tuple(names.EXIT_SCHEDULES))),
        "fixed_exit": unset(int, 'The exit of "fixed", from 1 to the number of exits. Unset: the model\'s default '
            "exit.", Rule(lambda number: number >= 1, "an exit's number, from 1")),
        "train_exits": Field((), "The exits that are drawn, for example 1,3,5,7; the others are then unseen in "
            'training. Empty: all of the model. Not for "fixed".', EXIT_NUMBERS, origin="ours"),
        "kl_coef": Field(0.2, "First coefficient of the KL term.", NOT_NEGATIVE, unit="per nat", origin="TRL"),
        "kl_kind": Field("k1", "Estimator of the KL of a token, with d = log_prob - ref_log_prob: k1 is d, k2 is d^2 / "
            "2, k3 is exp(-d) - 1 + d.", one_of(names.KL_KINDS), origin="TRL"),
        "kl_adaptive": Field(True, "The coefficient follows kl_target.", origin="TRL"),
        "kl_target": Field(6.0, "KL that an adaptive coefficient aims at.", POSITIVE, unit="nats per sequence",
            origin="TRL"),
        "kl_horizon": Field(10000.0, "How slowly an adaptive coefficient moves: in one rollout by at most 0.2 x "
            "batch_size / kl_horizon of itself.", POSITIVE, unit="sequences", origin="TRL"),
        "gamma": Field(1.0, "Discount.", SHARE, origin="TRL"),
        "lam": Field(0.95, "GAE's lambda.", SHARE, origin="TRL"),
        "clip_range": Field(0.2, "The paper's epsilon.", POSITIVE, origin="TRL"),
        "dual_clip": Field(0.0, "Bound of a token's loss where its advantage is negative (Ye et al. 2020: 3). 0 = "
            "off.", OFF_OR_ABOVE_1, unit="advantages"),
        "value_clip_range": Field(0.0, "Clips the value head's prediction around the old one. 0 = off: the paper's "
            "value loss is the plain squared error.", NOT_NEGATIVE, origin="paper"),
        "value_coef": Field(0.1, "The paper's c1, which multiplies the squared error (V - R)^2. TRL multiplies half "
            "the squared error by the same number: our term is twice as large.", NOT_NEGATIVE, origin="TRL"),
        "value_stop_gradient": Field(False, "True: the value head learns on fixed features.", origin="ours"),
        "value_learning_rate": unset(float, "Learning rate of the value head. Unset: optimizer.learning_rate. With "
            "this or one of the next two fields set, the value head has an optimizer of its own and its gradient is "
            "clipped separately. With none of them, one norm of both gradients is clipped, and a large value error "
            "shrinks the policy's steps.", NOT_NEGATIVE, origin="ours"),
        "value_max_grad_norm": unset(float, "Largest gradient norm of the value head, 0 = off. Unset: "
            "optimizer.max_grad_norm.", NOT_NEGATIVE, origin="ours"),
        "value_warmup_steps": unset(int, "Warm-up of the value head's learning rate. Unset: optimizer.warmup_steps.",
            NOT_NEGATIVE, unit="optimizer steps", origin="ours"),
        "whiten_advantages": Field(True, "Whiten the advantages over the rewarded rows of the whole rollout batch, "
            "padding left out. Rows of a kind that nothing rewards do not count.", origin="TRL"),
        "whiten_rewards": Field(False, "Whiten the rewards over the same rows.", origin="TRL"),
        "epochs": Field(4, "Passes over one rollout.", POSITIVE, origin="TRL"),
        "minibatches": Field(1, "Optimizer steps per epoch.", POSITIVE, origin="TRL"),
        "accumulation": Field(8, "Slices of a mini-batch whose gradients are summed.", POSITIVE,
            origin="ours, for memory"),
        "target_kl": Field(0.0, "Approximate KL beyond which the remaining updates of a rollout are skipped. 0 = off.",
            NOT_NEGATIVE, unit="nats per token"),
        "max_ratio": Field(0.0, "Ratio of any token beyond which the remaining updates of a rollout are skipped. 0 = "
            "off.", OFF_OR_ABOVE_1),
        "max_kl": Field(0.0, "Largest mean KL to the reference. 0 = off. A rollout beyond it is not learnt from: the "
            "run goes back to the newest checkpoint whose own rollout was within it, at half the learning rate each "
            "time.", NOT_NEGATIVE, unit="nats per sequence"),
        "on_instability": Field("stop", "What follows a rollout beyond max_kl, or a loss or gradient that is NaN or "
            'infinite. Neither is ever applied. "stop": the run ends with a good last checkpoint; beyond max_kl that '
            'is the state to which it went back, from which the same command goes on more slowly. "skip": the run goes '
            "on with the next rollout, and counts the skipped ones.", one_of(names.INSTABILITIES)),
        "max_skipped": Field(5, 'Iterations in a row that "skip" may skip. One more stops the run.', NOT_NEGATIVE,
            unit="iterations"),
        "temperature": Field(1.0, "Temperature of rollouts, and of every log-prob after them.", POSITIVE,
            origin="ours, as in TRL"),
        "max_new_tokens": Field(128, "Longest response of a rollout.", POSITIVE, unit="tokens", origin="TRL"),
        "log_prob_chunk": Field(16, "Response positions whose logits are in memory at once.", POSITIVE,
            unit="positions", origin="ours, for memory"),
        "entropy_coef": Field(0.0, "Coefficient of the entropy bonus. 0 = off.", NOT_NEGATIVE),
        "anchor_coef": Field(0.0, "Coefficient of the anchor: KL(reference at the default exit || policy at the drawn "
            "exit), per token of the rollout, over the whole vocabulary. It needs a default exit that is safe. 0 = "
            "off, which is the paper.", NOT_NEGATIVE, unit="per nat", origin="ours"),
    }
)
LSFT = Section(
    {
        "iterations": Field(94, "Batches of the run. Epochs, mini-batches and max_new_tokens are lppo's, so that the "
            "budget is the same.", NOT_NEGATIVE, unit="batches", origin="ours"),
        "refusal": Field("I'm sorry, but I can't help with that.", "What forbidden rows learn to answer. Other rows "
            "learn their own answer.", Rule(lambda text: bool(text.strip()), "a sentence")),
        "exits": Field("per_example", "As lppo.exits.", one_of(tuple(names.EXIT_SCHEDULES))),
    }
)
LDISTILL = Section(
    {
        "iterations": Field(94, "Batches of the run. Epochs, mini-batches, temperature and max_new_tokens are lppo's, "
            "so that the budget is the same.", NOT_NEGATIVE, unit="batches", origin="ours"),
        "on": Field("policy", 'Whose answers the distributions are compared on. "policy": its own at the drawn exit. '
            '"default": those of the model before training at its default exit.', one_of(names.DISTILLED_ON),
            origin="ours"),
        "exits": Field("per_example", "As lppo.exits.", one_of(tuple(names.EXIT_SCHEDULES))),
    }
)
OPTIMIZER = Section(
    {
        "learning_rate": Field(1e-5, "Highest learning rate.", POSITIVE, origin="ours (TRL: 1.41e-5)"),
        "schedule": Field("constant", "The learning rate after the warm-up: constant, or falling to zero as a line or "
            "a cosine.", one_of(names.LEARNING_RATE_SCHEDULES), origin="TRL"),
        "warmup_steps": Field(0, "Warm-up from 0 to the highest learning rate.", NOT_NEGATIVE, unit="optimizer steps"),
        "b1": Field(0.9, "Decay of the first moment.", DECAY, origin="Adam"),
        "b2": Field(0.999, "Decay of the second moment.", DECAY, origin="Adam"),
        "eps": Field(1e-8, "Added to the root of the second moment.", POSITIVE, origin="Adam"),
        "weight_decay": Field(0.0, "Decoupled weight decay.", NOT_NEGATIVE, origin="TRL: Adam without decay"),
        "max_grad_norm": Field(1.0, "Largest global norm of the gradient. 0 = off.", NOT_NEGATIVE, origin="ours"),
    },
    about="AdamW.",
)
SWEEP = Section(
    {
        "exits": Field("all", "Which exits are measured.", _EXITS, type=object),
        "datasets": Field({}, "{name: source} of forbidden and benign rows, measured at every exit before and after.",
            table=_SOURCES),
        "utility": Field({}, "{name: source} of rows with an answer (VQA), measured before and after.", table=_SOURCES),
        "limit": unset(int, "Rows of each source. Unset: all.", POSITIVE, unit="rows"),
        "batch_size": Field(32, "Rows answered at once.", POSITIVE, unit="rows"),
        "max_new_tokens": Field(128, "Longest answer.", POSITIVE, unit="tokens", origin="ours"),
        "temperature": Field(0.0, "0 = greedy. The paper has one generation per prompt.", NOT_NEGATIVE, origin="ours"),
        "top_k": Field(0, "Draw among the k likeliest tokens. 0 = off. Needs a temperature.", NOT_NEGATIVE),
        "top_p": Field(1.0, "Draw among the likeliest tokens that together have this probability. 1 = off. Needs a "
            "temperature.", Rule(lambda share: 0 < share <= 1, "above 0 and at most 1")),
        "score_cache": unset(str, "Folder of scores by (scorer, prompt, response), shared by all runs that name it. "
            "Unset: WORKDIR/scores."),
        "scorers": Field(("refusal_keywords",), "What judges a response, side by side: names of `config.scorers` or "
            "scorer checkpoints.",
            Rule(lambda used: len(used) > 0 and all(isinstance(s, str) for s in used), "at least one scorer")),
        "utility_scorers": Field((), "What judges the answers of utility rows. None: the scorers of `sweep.scorers`.",
            Rule(lambda used: all(isinstance(s, str) for s in used), "scorers' names")),
        "reveal_unsafe": Field(False, "True: the report shows responses that a judge called unsafe."),
    }
)
EXPORT = Section(
    {
        "form": Field("full", '"full": the whole model with the LoRA merged. "adapter": a PEFT adapter. "both": both.',
            one_of(names.EXPORT_FORMS)),
        "shard_gigabytes": Field(5.0, "Largest file of the full model.", POSITIVE, unit="10^9 bytes"),
    }
)
LOG = Section(
    {
        "every": Field(1, "Distance between two rows of metrics.jsonl.", POSITIVE, unit="iterations"),
        "tensorboard": Field(True, "Write events.* beside metrics.jsonl."),
        "wandb": Field(False, "Log to Weights & Biases. Needs the `wandb` extra."),
    }
)
CHECKPOINT = Section(
    {
        "every": Field(10, "Distance between two complete checkpoints. The last iteration always has one.", POSITIVE,
            unit="iterations"),
        "keep": Field(2, "How many of the newest checkpoints are kept.", POSITIVE),
        "best": unset(str, 'Name of a metric in metrics.jsonl, such as "objective/rlhf_reward". The checkpoint with '
            "the best value is kept as well. It is the one that align measures and exports at the end, and that "
            "--mode=export writes. A checkpoint's value is that of the next iteration's rollout, which the "
            "checkpoint's policy makes; one more iteration, which is dropped, measures the last checkpoint. Unset: the "
            "last checkpoint is taken."),
        "best_is": Field("highest", "Which value of checkpoint.best is the best.", one_of(names.BEST_IS)),
    }
)

CONFIG: Tree = {
    "algorithm": Field("lppo", '"lppo": L-PPO. "lsft": supervised refusals at sampled exits, the ablation. '
        '"ldistill": every exit learns the default exit\'s distribution, without a reward.',
        one_of(tuple(names.ALGORITHMS)), origin="paper (lsft, ldistill: ours)"),
    "seed": Field(0, "Drives exits, sampling, the order of the data and the first values of adapters.", _SEED),
    "seeds": Field((), "Several seeds: one run each under WORKDIR/seed_K, and one report over all of them.",
        _SEEDS),
    "model": MODEL,
    "mesh": MESH,
    "lora": LORA,
    "data": DATA,
    "scorers": Field({}, "{name: definition} for `sweep.scorers` and `reward.model`; see the table of kinds below.",
        table=Table(dict, matches(r"[A-Za-z0-9_.-]+", "is part of metrics' names; use letters, digits, _ - . alone"))),
    "reward": REWARD,
    "rm": RM,
    "lppo": LPPO,
    "lsft": LSFT,
    "ldistill": LDISTILL,
    "optimizer": OPTIMIZER,
    "sweep": SWEEP,
    "export": EXPORT,
    "log": LOG,
    "checkpoint": CHECKPOINT,
    "compilation_cache": unset(str, 'Folder where compiled programs are kept for later runs, or "off". Unset: '
        "JAX_COMPILATION_CACHE_DIR, else in the user's cache folder, ~/.cache/icet_jax/compiled."),
}
# fmt: on
"""The whole config, in the order in which a run directory's config.json has it."""

FIELDS = leaves(CONFIG)
"""Dotted name -> field."""

OPEN_FIELDS = {name: field.table for name, field in sorted(FIELDS.items()) if field.table is not None}
"""Dotted name -> what may be in it, for the fields whose keys the user chooses."""


def default() -> ConfigDict:
    """Returns the defaults, locked: L-PPO on a LLaVA-1.5-sized model as the paper describes it."""
    return build(CONFIG)
