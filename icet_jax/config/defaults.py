"""Every setting: its default, its unit, where it comes from and what is allowed.

A file in `configs/` builds on `default()`, changes what its experiment changes and returns the result from
`get_config(variant)`; `icet_jax.runs.config_files.load` finds that file, applies the command line's overrides and
checks the outcome. Nothing here imports jax, so a wrong field or value is named at once.

Origins: *paper* is the ICML 2025 text; *TRL* the defaults of TRL 0.11.4, the last with this PPO, whose formulas the
paper's match; *RiC* is Rewards-in-Context's PPO, the source of the reward model; *ours* is this project's own choice.
"""

from ml_collections import ConfigDict, config_dict

from icet_jax.config.names import PROJECTIONS


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
    config.scorers = ConfigDict()  # {name: definition}, for `sweep.scorers` and `reward.model`; see `SCORER_FIELDS`
    config.reward = _reward()
    config.rm = _rm()
    config.lppo = _lppo()
    config.lsft = _lsft()
    config.optimizer = _optimizer()
    config.sweep = _sweep()
    config.export = _export()
    config.log = _log()
    config.checkpoint = _checkpoint()
    # Folder where compiled programs are kept for later runs, or "off"; unset: JAX_COMPILATION_CACHE_DIR, else in the
    # cache folder of the user, ~/.cache/icet_jax/compiled.
    config.compilation_cache = config_dict.placeholder(str)
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
    model.revision = config_dict.placeholder(str)  # of a hub id: branch, tag or commit; unset: the default branch
    model.adapter = config_dict.placeholder(str)  # PEFT directory or hub id of a LoRA to start from, merged at load
    # What exit l feeds the projector where a family has several readings (Llama 3.2 Vision: "E1", "E2", "E5").
    model.exit_rule = config_dict.placeholder(str)
    # What an index of Llama 3.2 Vision's captured intermediates means: the state that enters that block ("input", as
    # trained) or the one that leaves it ("output", as transformers since 4.56 reads it).
    model.intermediate_capture = "input"
    model.dtype = "bfloat16"  # compute; norms, softmax, log-probs, adapters and optimizer stay float32 (ours)
    # What the backward pass recomputes: "none", "dots" (all but products with weights), "full" (all; least memory).
    model.remat = "dots"
    return model


def _mesh() -> ConfigDict:
    mesh = ConfigDict()  # devices along each axis; -1, once, takes the rest
    mesh.data = -1  # rows of a batch
    mesh.fsdp = 1  # rows too, and weights and train state
    mesh.tensor = 1  # weights by columns and heads
    return mesh


def _lora() -> ConfigDict:
    lora = ConfigDict()
    lora.rank = 64  # RiC; 0 trains the whole language model, with a frozen copy as the reference
    lora.alpha = 128.0  # RiC; updates are scaled by alpha / rank
    lora.targets = PROJECTIONS  # decoder projections that get an adapter (ours: all)
    return lora


def _data() -> ConfigDict:
    data = ConfigDict()
    # .csv or .jsonl of (prompt, image[, kind, answer]), FORMAT:PATH, "organism:train", or several joined by " + ".
    data.train = config_dict.placeholder(str)
    data.root = config_dict.placeholder(str)  # folder that relative paths of sources start from; unset: where you are
    data.mixture = ConfigDict({"forbidden": 1.0})  # share of each kind of row; paper: harmful prompts alone
    data.batch_size = 64  # sequences per rollout; ours (TRL: 128)
    data.max_prompt_tokens = 768  # positions of the prompt bucket, image positions (576 in LLaVA-1.5) included; ours
    # What becomes of a row whose prompt does not fit max_prompt_tokens (training) or the model's positions (all sets);
    # all rows are measured before anything is compiled. "drop": left out and counted; "stop": the start is refused.
    data.too_long = "drop"
    # Where `--mode=prepare` writes the data sets (TFDS array_record) and runs read them; unset: each run reads the
    # sources themselves.
    data.directory = config_dict.placeholder(str)
    # Chat template of LLaVA-1.5 and LLaVA-NeXT on Vicuna: "vicuna_v1" has the system prompt of the original LLaVA-1.5
    # evaluations ("a curious user"), "llava_v1" that of LLaVA-NeXT's model card ("a curious human"). Unset: the
    # checkpoint's own. Another system prompt is another attack surface (ours).
    data.template = config_dict.placeholder(str)
    data.image_root = config_dict.placeholder(str)  # folder of relative image paths; unset: beside the data file
    return data


def _reward() -> ConfigDict:
    reward = ConfigDict()
    # A name of `config.scorers`, HF directory or hub id of a sequence classifier, or "organism:reward_model".
    reward.model = config_dict.placeholder(str)
    # What rewards a row of each kind; "none": it learns from the KL alone. A text-only reward model cannot grade an
    # answer about an image.
    reward.by_kind = ConfigDict({"forbidden": "reward_model", "benign": "reward_model", "vqa": "exact_match"})
    reward.normalise = False  # reward-model scores minus their running mean, over their standard deviation; TRL: off
    reward.clip = 0.0  # scores are clipped to +-clip after normalising; 0 = off, as in TRL
    reward.missing_eos_penalty = 0.0  # subtracted from the score of a response without EOS; 0 = off, as in TRL
    return reward


def _rm() -> ConfigDict:
    """`--mode=reward`; its base is `model`, its optimizer `optimizer`, and `checkpoint` and `log` count its steps."""
    rm = ConfigDict()
    # Preference pairs in HH-RLHF's format, .jsonl or .jsonl.gz, or "organism:train[:COUNT]".
    rm.train = config_dict.placeholder(str)
    rm.held_out = config_dict.placeholder(str)  # the same, for the accuracy; unset: held_out_share of rm.train
    rm.held_out_share = 0.05  # of the prompts of rm.train, each with all of its pairs (ours)
    rm.name = config_dict.placeholder(str)  # what metrics call the model; unset: the name of the run directory
    rm.template = config_dict.placeholder(str)  # with {prompt}; unset: that of the paper's reward model
    rm.max_tokens = 1024  # of prompt and response together, at most the model's positions; GPT-2 has 1024
    rm.epochs = 1.0  # passes over the pairs; more overfit (Ouyang et al. 2022, Bai et al. 2022)
    rm.batch_size = 64  # pairs per optimizer step; Ouyang et al. 2022
    rm.accumulation = 8  # slices of a batch whose gradients are averaged; ours, for memory
    rm.length_window = 32  # batches among which pairs are sorted by length, to save padding; 1 = off (ours)
    return rm


def _lppo() -> ConfigDict:
    lppo = ConfigDict()
    lppo.iterations = 94  # rollouts; 94 x 64 sequences is three passes over RedTeam-2K (ours)
    lppo.exits = "per_example"  # "fixed" (the paper's text), "per_batch", "per_example", "stratified"
    lppo.fixed_exit = config_dict.placeholder(int)  # the exit of "fixed", 1..num_exits; unset: the default exit
    lppo.kl_coef = 0.2  # initial coefficient of the KL term, per nat; TRL
    lppo.kl_kind = "k1"  # per-token estimator: d, d^2/2 or exp(-d)-1+d; TRL: k1
    lppo.kl_adaptive = True  # TRL: the coefficient follows kl_target
    lppo.kl_target = 6.0  # nats per sequence; TRL
    # Sequences; TRL. In one rollout the coefficient moves by at most 0.2 x batch_size / kl_horizon of itself.
    lppo.kl_horizon = 10000.0
    lppo.gamma = 1.0  # discount; TRL
    lppo.lam = 0.95  # GAE's lambda; TRL
    lppo.clip_range = 0.2  # the paper's epsilon; value from TRL
    # Bound of a token's loss where its advantage is negative, in advantages (Ye et al. 2020: 3); 0 = off.
    lppo.dual_clip = 0.0
    lppo.value_clip_range = 0.0  # 0 = off: the paper's value loss is the plain squared error
    # The paper's c1, of the squared error (V - R)^2. The number is TRL's, which halves the error: ours is twice its
    # term.
    lppo.value_coef = 0.1
    lppo.value_stop_gradient = False  # True: the value head learns on fixed features (ours)
    # Of the value head; unset: optimizer.learning_rate. With this or one of the next two fields set, the value head has
    # an optimizer of its own, and its gradient is clipped apart; with none, one norm of both is clipped, and a
    # large value error shrinks the policy's steps (ours).
    lppo.value_learning_rate = config_dict.placeholder(float)
    lppo.value_max_grad_norm = config_dict.placeholder(float)  # of the value head, 0 = off; unset: optimizer's (ours)
    lppo.value_warmup_steps = config_dict.placeholder(int)  # of the value head; unset: optimizer's (ours)
    # Over the rewarded rows of the whole rollout batch, masked; TRL. Rows of a kind that nothing rewards are left out.
    lppo.whiten_advantages = True
    lppo.whiten_rewards = False  # over the same rows; TRL
    lppo.epochs = 4  # passes over one rollout; TRL
    lppo.minibatches = 1  # optimizer steps per epoch; TRL: one
    lppo.accumulation = 8  # slices of a mini-batch whose gradients are summed; ours, for memory
    lppo.target_kl = 0.0  # approximate KL per token at which the remaining updates of a rollout are skipped; 0 = off
    lppo.max_ratio = 0.0  # largest ratio of any token beyond which they are skipped too; 0 = off
    # Mean KL to the reference, nats per sequence, that a state may have; 0 = off. A rollout beyond it is not learnt
    # from: the run goes back to the newest checkpoint whose own rollout was within it, at half the learning rate each
    # time.
    lppo.max_kl = 0.0
    # What follows from a rollout beyond max_kl, or a loss or gradient that is NaN or infinite; neither is ever applied.
    # "stop": the run ends with a good last checkpoint (beyond max_kl: the state that it went back to, from which the
    # same command goes on more slowly); "skip": it goes on with the next rollout, and counts them.
    lppo.on_instability = "stop"
    lppo.max_skipped = 5  # iterations in a row that "skip" gives up; with one more the run stops after all
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
    optimizer.learning_rate = 1e-5  # peak; ours (TRL: 1.41e-5)
    optimizer.schedule = "constant"  # after the warm-up: "constant", "linear" or "cosine" to zero; TRL: constant
    optimizer.warmup_steps = 0  # optimizer steps from 0 to the peak
    optimizer.b1 = 0.9  # decay of the first moment; Adam
    optimizer.b2 = 0.999  # of the second; Adam
    optimizer.eps = 1e-8  # beside the root of the second; Adam
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
    sweep.max_new_tokens = 128  # the longest answer (ours)
    sweep.temperature = 0.0  # 0 = greedy (ours); the paper: one generation per prompt
    sweep.top_k = 0  # 0 = off; needs a temperature
    sweep.top_p = 1.0  # 1 = off; needs a temperature
    # Folder of scores by (scorer, prompt, response), shared by all runs that name it; unset: WORKDIR/scores.
    sweep.score_cache = config_dict.placeholder(str)
    sweep.scorers = ("refusal_keywords",)  # what judges a response, side by side: names or scorer checkpoints
    sweep.utility_scorers = ()  # judges of the utility rows' answers; empty: those of `sweep.scorers`
    sweep.reveal_unsafe = False  # True: the report shows responses that a judge called unsafe
    return sweep


def _export() -> ConfigDict:
    export = ConfigDict()
    export.form = "full"  # "full": the whole model, LoRA merged; "adapter": a PEFT adapter; "both"
    export.shard_gigabytes = 5.0  # largest file of the full model, 10^9 bytes
    return export


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
    # Name in metrics.jsonl, such as "objective/rlhf_reward": of the checkpoints made every so many iterations, the one
    # with the best value is kept as well, and is what align measures and exports at the end, and --mode=export writes.
    # The value is that of the next iteration's rollout, which the checkpoint's policy makes; one more iteration, which
    # is dropped, measures the last. Unset: the last one is taken.
    checkpoint.best = config_dict.placeholder(str)
    checkpoint.best_is = "highest"  # or "lowest": which value of checkpoint.best is the best
    return checkpoint
