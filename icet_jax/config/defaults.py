"""Every setting, declared once: its default, meaning, unit, origin and allowed values.

`CONFIG` is the declaration. The config itself, its checks, the error lines that suggest a similar field and
docs/reference/config.md are all generated from it.

A file in `configs/` starts from `default()`, sets what differs in its experiment and returns the result from
`get_config(variant)`. `icet_jax.runs.config_files.load` finds that file, applies the command line's overrides and
checks the result. Nothing here imports jax, so a wrong field or value is reported at once.

Origins: *paper* is the ICML 2025 text. *TRL* is TRL 0.11.4, the last version with this PPO, whose formulas match the
paper's. *RiC* is Rewards-in-Context's PPO, the source of the reward model. *ours* is this project's own choice.
"""

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
_FACTORS = Table(
    float,
    names.KINDS,
    Rule(lambda factor: type(factor) in (int, float) and 0 <= factor < float("inf"), "a factor, 0 or more"),
)
_SOURCES = Table(
    str,
    matches(r"[A-Za-z0-9_-]+", "names a file; use letters, digits, _ and - alone"),
    Rule(lambda source: isinstance(source, str) and source != "", "a file or an organism: source"),
)


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _are_exits(value: object) -> bool:
    if not isinstance(value, tuple):
        return value == "all"
    return len(value) > 0 and all(type(number) is int and number >= 1 for number in value)


_SEED = Rule(_is_seed, "between 0 and 2^32 - 1")
_SEEDS = Rule(
    lambda seeds: all(map(_is_seed, seeds)) and len(set(seeds)) == len(seeds),
    "distinct whole numbers between 0 and 2^32 - 1",
)
_EXITS = Rule(_are_exits, '"all" or exits\' numbers, from 1, such as 1,12,23')

# Formatted by hand: every field begins a line, and its description continues on the next.
# fmt: off
MODEL = Section(
    {
        "checkpoint": unset(str, 'Hugging Face directory or hub id, or "organism:vlm". Every run needs it.'),
        "revision": unset(str, "Branch, tag or commit of a hub id. Unset: the default branch."),
        "adapter": unset(str, "PEFT directory or hub id of a LoRA to start from. It is merged into the model when the "
            "model is loaded."),
        "exit_rule": unset(str, "Definition of exit l in Llama 3.2 Vision, the one family that has several: what the "
            "projector gets of the image encoder. Unset: E1.", one_of(names.EXIT_RULES)),
        "intermediate_capture": Field("input", "Which state Llama 3.2 Vision captures at a block that "
            'intermediate_layers_indices lists. "input": the block\'s input, as the model was trained. "output": its '
            "output, as in transformers since 4.56.", one_of(names.CAPTURES)),
        "dtype": Field("bfloat16", "Dtype of weights and activations. Norms, softmax, log-probs, adapters and the "
            "optimizer are float32 in any case.", one_of(names.DTYPES), origin="ours"),
        "remat": Field("dots", 'Which activations the backward pass computes again instead of storing them. "none": '
            'none. "dots": all but the products with weights. "full": all, which takes the least memory.',
            one_of(names.REMATS)),
    }
)
MESH = Section(
    {
        "data": Field(-1, "Number of devices over which the rows of a batch are split.", AXIS),
        "fsdp": Field(1, "Number of devices over which rows, weights and train state are split.", AXIS),
        "tensor": Field(1, "Number of devices over which weights are split by columns and attention heads.", AXIS),
    },
    about="Number of devices along each axis of the mesh. One axis may be -1: it takes all remaining devices.",
)
LORA = Section(
    {
        "rank": Field(64, "Rank of the LoRA adapters. 0 trains the whole language model; the reference is then a "
            "frozen copy of it.", NOT_NEGATIVE, origin="RiC"),
        "alpha": Field(128.0, "The adapters' output is scaled by alpha / rank.", POSITIVE, origin="RiC"),
        "targets": Field(names.PROJECTIONS, "Projections of the decoder that get an adapter.",
            distinct(names.PROJECTIONS), origin="ours: all"),
    }
)
DATA = Section(
    {
        "train": unset(str, "Training rows: a .csv or .jsonl file of (prompt, image[, kind, answer]), FORMAT:PATH, "
            '"organism:train", or several of these joined by " + ".'),
        "root": unset(str, "Folder to which relative paths in sources refer. Unset: the working directory."),
        "mixture": Field({"forbidden": 1.0}, "Share of each kind of row in a training batch.", table=_SHARES,
            origin="paper: harmful prompts alone"),
        "batch_size": Field(64, "Responses per iteration, over all processes: one of each prompt, or lrloo.group_size "
            "of each.", POSITIVE, unit="sequences", origin="ours (TRL: 128)"),
        "max_prompt_tokens": Field(768, "Most positions of a training prompt, image positions included (576 in "
            "LLaVA-1.5).", POSITIVE, unit="positions", origin="ours"),
        "too_long": Field("drop", "What happens to a row whose prompt is longer than max_prompt_tokens (training) or "
            'than the model\'s positions (all data sets). "drop": it is left out and counted. "stop": the run does not '
            "start. All rows are measured before anything is compiled.", one_of(names.TOO_LONG)),
        "directory": unset(str, "Folder to which `--mode=prepare` writes the data sets (TFDS array_record) and from "
            "which runs read them. Unset: each run reads the sources itself."),
        "template": unset(str, 'Chat template of LLaVA-1.5 and LLaVA-NeXT on Vicuna. "vicuna_v1" has the system prompt '
            'of the original LLaVA-1.5 evaluations ("a curious user"), "llava_v1" that of LLaVA-NeXT\'s model card ("a '
            'curious human"). Unset: the checkpoint\'s own. Another system prompt is another attack surface.',
            one_of(names.TEMPLATES), origin="ours"),
        "image_root": unset(str, "Folder to which relative image paths refer. Unset: the folder of the data file."),
    }
)
REWARD = Section(
    {
        "model": unset(str, "A name of `config.scorers`, the Hugging Face directory or hub id of a sequence "
            'classifier, or "organism:reward_model".'),
        "by_kind": Field({"forbidden": "reward_model", "benign": "reward_model", "vqa": "exact_match"}, "What the "
            'reward of each kind of row is. "reward_model": the score of `reward.model`, which reads text alone and so '
            'cannot grade an answer about an image. "exact_match": 1 for the expected answer, else 0. "none": no '
            "reward; only the KL term remains.", table=Table(str, names.KINDS, one_of(names.REWARDS))),
        "normalise": Field(False, "True: the running mean is subtracted from the reward model's scores, and the result "
            "is divided by the running standard deviation.", origin="TRL: off"),
        "clip": Field(0.0, "After normalising, scores are clipped to the range -clip to clip. 0 = off.", NOT_NEGATIVE,
            origin="TRL"),
        "missing_eos_penalty": Field(0.0, "Subtracted from the score of a response without EOS. 0 = off.",
            NOT_NEGATIVE, origin="TRL"),
    }
)
RM = Section(
    {
        "train": unset(str, 'Preference pairs in HH-RLHF\'s format: .jsonl or .jsonl.gz, or "organism:train[:COUNT]"; '
            'several joined by " + ".'),
        "held_out": unset(str, "Preference pairs on which the accuracy is measured, in all and for each of several "
            "sources. Unset: held_out_share of rm.train."),
        "held_out_share": Field(0.05, "Share of the prompts of rm.train that is held out, each prompt with all of its "
            "pairs.", Rule(lambda share: 0 < share < 1, "above 0 and below 1"), origin="ours"),
        "name": unset(str, "Name of the reward model in metrics. Unset: the name of the run directory.",
            matches(r"[a-z0-9_]+", "small letters, digits and _: it is part of metrics' names")),
        "template": unset(str, "Text around the prompt, in front of the response. It contains {prompt}, and, where the "
            "response does not stand at the end, {response} (not for GPT-2). Unset: the tokenizer's chat template; for "
            "GPT-2, and without one, that of the paper's reward model.", holds_once("{prompt}")),
        "max_tokens": Field(1024, "Most tokens of prompt and response together, at most the model's positions (GPT-2: "
            "1024). Longer pairs are truncated.", POSITIVE, unit="tokens"),
        "epochs": Field(1.0, "Passes over the pairs. More than one overfits.", POSITIVE,
            origin="Ouyang et al. 2022, Bai et al. 2022"),
        "batch_size": Field(64, "Pairs per optimizer step.", POSITIVE, unit="pairs", origin="Ouyang et al. 2022"),
        "accumulation": Field(8, "Slices into which a batch is cut; their gradients are averaged. More slices take "
            "less memory.", POSITIVE, origin="ours, for memory"),
        "length_window": Field(32, "Pairs are sorted by length within groups of this many batches, to save padding. "
            "1 = off.", POSITIVE, unit="batches", origin="ours"),
    },
    about="Settings of `--mode=reward`, which also uses `model`, `optimizer`, `checkpoint` and `log`; an iteration is "
    "a step.",
)
LPPO = Section(
    {
        "iterations": Field(94, "Number of iterations. 94 rollouts of 64 sequences are three passes over RedTeam-2K.",
            NOT_NEGATIVE, unit="rollouts", origin="ours"),
        "exits": Field("per_example", 'Which exit each sequence is trained at. "fixed": always fixed_exit, as in the '
            'paper\'s text. "per_batch": one random exit for all rows. "per_example": a random exit for each row. '
            '"stratified": random, but equally many rows from early, middle and late exits. "adaptive": random, where '
            "exits at which more forbidden requests were not refused in recent rollouts are more likely (about the "
            'last ten rollouts, by the refusal keywords); no exit gets a probability of 0.',
            one_of(tuple(names.EXIT_SCHEDULES))),
        "fixed_exit": unset(int, 'The exit of "fixed", from 1 to the number of exits. Unset: the model\'s default '
            "exit.", Rule(lambda number: number >= 1, "an exit's number, from 1")),
        "train_exits": Field((), "The exits that training samples from, for example 1,3,5,7; the others are never "
            'trained. Empty: all exits of the model. Not for "fixed".', EXIT_NUMBERS, origin="ours"),
        "kl_coef": Field(0.2, "Coefficient of the KL term in the reward at the start of the run.", NOT_NEGATIVE,
            unit="per nat", origin="TRL"),
        "kl_kind": Field("k1", "Estimator of the KL of a token, with d = log_prob - ref_log_prob: k1 is d, k2 is d^2 / "
            "2, k3 is exp(-d) - 1 + d.", one_of(names.KL_KINDS), origin="TRL"),
        "kl_adaptive": Field(True, "True: the coefficient rises while the KL is above kl_target and falls while it is "
            "below. False: it stays at kl_coef.", origin="TRL"),
        "kl_target": Field(6.0, "KL at which an adaptive coefficient stays the same.", POSITIVE,
            unit="nats per sequence", origin="TRL"),
        "kl_horizon": Field(10000.0, "How slowly an adaptive coefficient changes: per rollout by at most the share "
            "0.2 x batch_size / kl_horizon.", POSITIVE, unit="sequences", origin="TRL"),
        "kl_coef_by_kind": Field({"forbidden": 1.0, "benign": 1.0, "vqa": 1.0}, "Factor of the KL coefficient for rows "
            "of each kind. A kind that is left out has 1. kl_target is compared with the KL without factors.",
            table=_FACTORS, origin="ours: off"),
        "gamma": Field(1.0, "Discount.", SHARE, origin="TRL"),
        "lam": Field(0.95, "GAE's lambda.", SHARE, origin="TRL"),
        "clip_range": Field(0.2, "The ratio of new to old probability is clipped to the range 1 - clip_range to 1 + "
            "clip_range (the paper's epsilon).", POSITIVE, origin="TRL"),
        "dual_clip": Field(0.0, "A token with a negative advantage A has at most the loss dual_clip x |A| (Ye et al. "
            "2020: 3). 0 = off.", OFF_OR_ABOVE_1, unit="advantages"),
        "value_clip_range": Field(0.0, "The new value may differ from the old one by at most this much in the value "
            "loss. 0 = off: the paper's value loss is the plain squared error.", NOT_NEGATIVE, origin="paper"),
        "value_coef": Field(0.1, "The paper's c1: the factor of the squared error (V - R)^2 in the loss. TRL "
            "multiplies half of the squared error by the same number, so our term is twice as large.", NOT_NEGATIVE,
            origin="TRL"),
        "value_stop_gradient": Field(False, "True: the value loss trains the value head alone, not the language model.",
            origin="ours"),
        "value_learning_rate": unset(float, "Learning rate of the value head. Unset: optimizer.learning_rate. If this "
            "or one of the next two fields is set, the value head has an optimizer of its own and its gradient is "
            "clipped separately. If none is set, the gradient of policy and value head is clipped by its common norm, "
            "so that a large value error makes the policy's steps smaller.", NOT_NEGATIVE, origin="ours"),
        "value_max_grad_norm": unset(float, "Largest gradient norm of the value head, 0 = off. Unset: "
            "optimizer.max_grad_norm.", NOT_NEGATIVE, origin="ours"),
        "value_warmup_steps": unset(int, "Steps in which the value head's learning rate rises from 0. Unset: "
            "optimizer.warmup_steps.", NOT_NEGATIVE, unit="optimizer steps", origin="ours"),
        "whiten_advantages": Field(True, "True: advantages are shifted and scaled to mean 0 and variance 1 over all "
            "response tokens of a rollout, without rows whose kind has no reward.", origin="TRL"),
        "baseline": Field("rollout", 'Which rows share the mean and the standard deviation of whiten_advantages. '
            '"rollout": all of them. "exit_kind": those of one exit and one kind.', one_of(names.BASELINES),
            origin="TRL"),
        "baseline_min_rows": Field(8, 'Least number of rows of one exit and kind with "exit_kind". Fewer take the mean '
            "and the standard deviation of their kind at all exits, or, where that has fewer too, of all rows.",
            POSITIVE, unit="rows", origin="ours"),
        "baseline_min_std": Field(0.1, 'Least standard deviation that "exit_kind" divides by: rows that are nearly '
            "equal must not become advantages of 1.", POSITIVE, unit="advantages before whitening", origin="ours"),
        "whiten_rewards": Field(False, "True: the rewards per token are whitened in the same way.", origin="TRL"),
        "epochs": Field(4, "Passes over one rollout.", POSITIVE, origin="TRL"),
        "minibatches": Field(1, "Mini-batches, that is optimizer steps, per epoch.", POSITIVE, origin="TRL"),
        "accumulation": Field(8, "Slices into which a mini-batch is cut; their gradients are summed. More slices take "
            "less memory.", POSITIVE, origin="ours, for memory"),
        "target_kl": Field(0.0, "If the approximate KL between old and new policy exceeds this, the remaining updates "
            "on the rollout are skipped. 0 = off.", NOT_NEGATIVE, unit="nats per token"),
        "max_ratio": Field(0.0, "If any token's ratio of new to old probability exceeds this, the remaining updates on "
            "the rollout are skipped. 0 = off.", OFF_OR_ABOVE_1),
        "max_kl": Field(0.0, "Largest mean KL of a rollout to the reference. 0 = off. If a rollout exceeds it, nothing "
            "is learnt from it. The run returns to the newest checkpoint whose rollout was below it, and halves the "
            "learning rate.", NOT_NEGATIVE, unit="nats per sequence"),
        "on_instability": Field("stop", "What happens if a rollout exceeds max_kl, or if a loss or gradient is NaN or "
            'infinite. Such an update is never applied. "stop": the run ends, and its last checkpoint is sound (after '
            'max_kl: the one it returned to); the same command continues from there. "skip": the run continues with '
            "the next rollout and counts the skipped ones.", one_of(names.INSTABILITIES)),
        "max_skipped": Field(5, 'Most consecutive iterations that "skip" skips. One more stops the run.', NOT_NEGATIVE,
            unit="iterations"),
        "temperature": Field(1.0, "Sampling temperature of rollouts. All log-probs are computed at it.", POSITIVE,
            origin="ours, as in TRL"),
        "max_new_tokens": Field(128, "Longest response of a rollout.", POSITIVE, unit="tokens", origin="TRL"),
        "log_prob_chunk": Field(16, "Response positions whose logits are in memory at once.", POSITIVE,
            unit="positions", origin="ours, for memory"),
        "entropy_coef": Field(0.0, "Factor of the policy's entropy, which is subtracted from the loss. 0 = off.",
            NOT_NEGATIVE),
        "anchor_coef": Field(0.0, "Coefficient of the anchor, a loss term: KL(reference at the default exit || policy "
            "at the sampled exit) of each response token, over the whole vocabulary. It makes sense if the default "
            "exit is safe. 0 = off, as in the paper.", NOT_NEGATIVE, unit="per nat", origin="ours"),
    }
)
LSFT = Section(
    {
        "iterations": Field(94, "Number of iterations. Epochs, mini-batches and max_new_tokens are those of `lppo`, so "
            "that both train equally long.", NOT_NEGATIVE, unit="batches", origin="ours"),
        "refusal": Field("I'm sorry, but I can't help with that.", "Target answer of all forbidden rows. Rows of other "
            "kinds are trained on their expected answer.", Rule(lambda text: bool(text.strip()), "a sentence")),
        "train": Field("language", 'What is trained. "language": the language model, by LoRA or in full as `lora` '
            'says. "projector": all weights of the projector and nothing else; `lora` has no effect. "both": the '
            "projector and the language model. Always frozen: the image encoder, and LLaVA-NeXT's image_newline.",
            one_of(tuple(names.TRAINED)), origin="ours"),
        "exits": Field("per_example", "See lppo.exits.", one_of(tuple(names.EXIT_SCHEDULES))),
    }
)
LDISTILL = Section(
    {
        "iterations": Field(94, "Number of iterations. Epochs, mini-batches, temperature and max_new_tokens are those "
            "of `lppo`, so that both train equally long.", NOT_NEGATIVE, unit="batches", origin="ours"),
        "on": Field("policy", "Whose answers the two distributions are compared on, token by token. "
            '"policy": those of the model in training, at the sampled exit. "default": those of the model before '
            "training, at its default exit.", one_of(names.DISTILLED_ON), origin="ours"),
        "exits": Field("per_example", "See lppo.exits.", one_of(tuple(names.EXIT_SCHEDULES))),
    }
)
LRLOO = Section(
    {
        "iterations": Field(94, "Batches of the run. KL, clipping, guards, anchor, epochs, mini-batches, temperature "
            "and max_new_tokens are lppo's. A batch has data.batch_size responses, so the budget is the same.",
            NOT_NEGATIVE, unit="batches", origin="ours"),
        "group_size": Field(4, "Responses of each prompt, at one exit. A batch has data.batch_size / group_size "
            "prompts.", Rule(lambda size: size >= 2, "2 or more: a response is compared with the others of its group"),
            unit="responses", origin="Ahmadian et al. 2024"),
        "advantage": Field("rloo", 'What a response is compared with. "rloo": the mean reward of the others, with the '
            'KL in the reward. "grpo": the mean of its group, divided by the group\'s standard deviation, with the KL '
            "(always k3) in the loss.", one_of(names.GROUP_ADVANTAGES), origin="Ahmadian et al. 2024"),
        "exits": Field("per_example", "As lppo.exits, one draw for all responses of a prompt.",
            one_of(tuple(names.EXIT_SCHEDULES))),
    }
)
LDPO = Section(
    {
        "iterations": Field(94, "Number of iterations, and of the batches whose prompts are answered to make pairs. "
            "Epochs, mini-batches, temperature and max_new_tokens are those of `lppo`, so that both train equally "
            "long.", NOT_NEGATIVE, unit="batches", origin="ours"),
        "exits": Field("per_example", "See lppo.exits. It draws the exits of the pairs, before training; a pair is "
            "learned at its own exit.", one_of(tuple(names.EXIT_SCHEDULES))),
        "beta": Field(0.1, "Weight of the log-ratio to the reference. The smaller it is, the further the policy may "
            "go.", POSITIVE, unit="per nat", origin="Rafailov et al. 2023"),
        "sft_coef": Field(1.0, "Coefficient of the negative log-likelihood of the chosen answer, per token. 0 = off: "
            "plain DPO.", NOT_NEGATIVE, unit="per nat", origin="Pang et al. 2024"),
        "pairs": unset(str, "File of pairs to learn from, .jsonl, as a run or --mode=sweep writes it into pairs/. Only "
            "pairs of rows of data.train are used. Unset: the run first makes pairs of data.train.", origin="ours"),
    }
)
OPTIMIZER = Section(
    {
        "learning_rate": Field(1e-5, "Learning rate after the warm-up.", POSITIVE, origin="ours (TRL: 1.41e-5)"),
        "schedule": Field("constant", "How the learning rate continues after the warm-up: it stays constant, or falls "
            "to zero along a line or a cosine.", one_of(names.LEARNING_RATE_SCHEDULES), origin="TRL"),
        "warmup_steps": Field(0, "Steps in which the learning rate rises linearly from 0.", NOT_NEGATIVE,
            unit="optimizer steps"),
        "b1": Field(0.9, "Decay of the first moment.", DECAY, origin="Adam"),
        "b2": Field(0.999, "Decay of the second moment.", DECAY, origin="Adam"),
        "eps": Field(1e-8, "Added to the square root of the second moment.", POSITIVE, origin="Adam"),
        "weight_decay": Field(0.0, "Decoupled weight decay.", NOT_NEGATIVE, origin="TRL: Adam without decay"),
        "max_grad_norm": Field(1.0, "A gradient with a larger global norm is scaled down to it. 0 = off.", NOT_NEGATIVE,
            origin="ours"),
    },
    about="Settings of AdamW.",
)
SWEEP = Section(
    {
        "exits": Field("all", "Which exits are measured.", _EXITS, type=object),
        "datasets": Field({}, "{name: source} of forbidden and benign rows. They are answered at every exit, before "
            "and after training.", table=_SOURCES),
        "utility": Field({}, "{name: source} of rows with an expected answer (VQA). They are answered at every exit, "
            "before and after training.", table=_SOURCES),
        "training_sets": Field((), "Names of those sets above that are training data. --mode=sweep writes L-DPO's "
            "pairs of their rows (pairs/sweep.jsonl), and of no others.",
            Rule(lambda sets: all(isinstance(name, str) for name in sets), "names of sets")),
        "limit": unset(int, "Most rows of each source. Unset: all.", POSITIVE, unit="rows"),
        "batch_size": Field(32, "Rows answered at once.", POSITIVE, unit="rows"),
        "max_new_tokens": Field(128, "Longest answer.", POSITIVE, unit="tokens", origin="ours"),
        "temperature": Field(0.0, "Sampling temperature. 0 = greedy. The paper has one answer per prompt.",
            NOT_NEGATIVE, origin="ours"),
        "attempts": Field(1, "Answers of each forbidden row at each exit, sampled independently; other rows get one. "
            "ASR is the mean over them, ASR@k the share of rows with an unsafe one among them. More than 1 need a "
            "temperature above 0.", POSITIVE, unit="answers", origin="ours"),
        "top_k": Field(0, "Sample from the k likeliest tokens. 0 = off. Needs a temperature above 0.", NOT_NEGATIVE),
        "top_p": Field(1.0, "Sample from the likeliest tokens that together have this probability. 1 = off. Needs a "
            "temperature above 0.", Rule(lambda share: 0 < share <= 1, "above 0 and at most 1")),
        "score_cache": unset(str, "Folder in which scores are stored, so that no scorer sees the same (prompt, "
            "response) twice. Several runs may share it. Unset: WORKDIR/scores."),
        "scorers": Field(("refusal_keywords",), "Scorers that score every answer: keys of `config.scorers`, "
            "directories or hub ids of checkpoints, or refusal_keywords.", Rule(lambda scorers: len(scorers) > 0 and
            all(isinstance(scorer, str) for scorer in scorers), "at least one scorer")),
        "utility_scorers": Field((), "Scorers of the answers to utility rows. None: those of `sweep.scorers`.",
            Rule(lambda scorers: all(isinstance(scorer, str) for scorer in scorers), "scorers' names")),
        "reveal_unsafe": Field(False, "True: the report shows answers that a judge called unsafe. False: it hides "
            "them."),
        "show_prompts": Field(True, "False: the report holds ids of rows in place of prompts, pictures and answers, "
            "with scores alone. For prompts that may not be passed on.", origin="ours"),
    }
)
EXPORT = Section(
    {
        "form": Field("full", 'What is exported. "full": the model, with its LoRA adapter merged. "adapter": the '
            'adapter in PEFT format. "both": both.', one_of(names.EXPORT_FORMS)),
        "shard_gigabytes": Field(5.0, "Largest size of a file of weights.", POSITIVE, unit="10^9 bytes"),
    }
)
LOG = Section(
    {
        "every": Field(1, "Iterations from one row of metrics.jsonl to the next.", POSITIVE, unit="iterations"),
        "tensorboard": Field(True, "True: the same metrics are written for TensorBoard (events.*)."),
        "wandb": Field(False, "True: metrics go to Weights & Biases. Needs the extra `wandb`."),
    }
)
CHECKPOINT = Section(
    {
        "every": Field(10, "Iterations from one training checkpoint to the next. The last iteration always has one.",
            POSITIVE, unit="iterations"),
        "keep": Field(2, "How many of the newest training checkpoints are kept.", POSITIVE),
        "best": unset(str, 'Name of a metric in metrics.jsonl, such as "objective/rlhf_reward". The checkpoint with '
            "the best value is kept too, and is the one that is measured and exported at the end. A checkpoint's value "
            "comes from the rollout of the following iteration, because the checkpoint's policy samples it; for the "
            "last checkpoint one more iteration is run and discarded. Unset: the last checkpoint is exported."),
        "best_is": Field("highest", "Whether the highest or the lowest value of checkpoint.best is the best.",
            one_of(names.BEST_IS)),
    }
)

CONFIG: Tree = {
    "algorithm": Field("lppo", '"lppo": L-PPO. "lsft": supervised training on a refusal at sampled exits, an ablation. '
        '"ldistill": every exit learns the default exit\'s token distribution, without a reward. "lrloo": several '
        "responses of one prompt and exit are compared with each other, without a value head. "
        '"ldpo": the default exit\'s refusals are preferred to what other exits answer.',
        one_of(tuple(names.ALGORITHMS)), origin="paper (lsft, ldistill, lrloo, ldpo: ours)"),
    "warm_start": Field("", "The training whose last policy this one starts from. The name of another algorithm: it is "
        "trained first, in WORKDIR/warm_start, with this config. A directory: that of an earlier run. Empty: none, "
        "training starts from the model. The reference stays the model in both cases.", origin="ours"),
    "seed": Field(0, "Seed of all random numbers: exits, sampling, order of the data, first values of adapters.",
        _SEED),
    "seeds": Field((), "Several seeds, in place of `seed`: one run for each under WORKDIR/seed_K, and one report over "
        "all of them.", _SEEDS),
    "model": MODEL,
    "mesh": MESH,
    "lora": LORA,
    "data": DATA,
    "scorers": Field({}, "{name: definition} of scorers that `sweep.scorers` and `reward.model` may name; see the "
        "table of kinds below.",
        table=Table(dict, matches(r"[A-Za-z0-9_.-]+", "is part of metrics' names; use letters, digits, _ - . alone"))),
    "reward": REWARD,
    "rm": RM,
    "lppo": LPPO,
    "lsft": LSFT,
    "ldistill": LDISTILL,
    "lrloo": LRLOO,
    "ldpo": LDPO,
    "optimizer": OPTIMIZER,
    "sweep": SWEEP,
    "export": EXPORT,
    "log": LOG,
    "checkpoint": CHECKPOINT,
    "compilation_cache": unset(str, 'Folder in which compiled programs are stored for later runs, or "off". Unset: '
        "the environment variable JAX_COMPILATION_CACHE_DIR, or else ~/.cache/icet_jax/compiled."),
}
# fmt: on
"""The declaration of the config, in the order of a run directory's config.json."""

FIELDS = leaves(CONFIG)
"""{dotted name: field} of all fields."""

OPEN_FIELDS = {name: field.table for name, field in sorted(FIELDS.items()) if field.table is not None}
"""{dotted name: table} of the fields that are dicts, such as `sweep.datasets`."""


def default() -> ConfigDict:
    """Returns a locked config with all defaults: L-PPO as the paper describes it, in sizes for LLaVA-1.5."""
    return build(CONFIG)
