"""The jitted phases of L-PPO: rollout, prepare, update; pure functions over explicit pytrees.

    graphdef, params = nnx.split(model)                    # frozen: tower, projector and the reference policy
    settings = settings.from_config(config, vlm.sampling(max_new_tokens, temperature))
    state = state.init_state(params, lora, hidden_size=model.hidden_size, optimizer=settings.optimizer, kl_coef=...)
    phases = learner.build(graphdef, settings, mesh)       # lora: models.family.init_lora(...), None = full fine-tuning
    run_key = jax.random.key(seed)

    while int(state.iteration) < iterations:
        exits = draw_exits(settings, run_key, state.iteration, batch=B, num_exits=.., default_exit=..)    # int32 [B]
        rollout = phases.rollout(params, state, images, tokens, mask, exits, run_key)
        scores, learned = ...                              # host: decode rollout.tokens by rollout.mask, score the text
        state, batch, metrics = phases.prepare(params, state, rollout, scores, learned, longest)
        state, more = phases.update(params, state, batch, run_key)        # donates `state`
        row = metrics.host_metrics(metrics, more); metrics.instability(row)

`images` is `nn.protocols.Images` with num_rows == B, or None where no row has one; `tokens`, `mask` [B, P] are
left-padded prompts; a filler row has an all-false mask. `scores` is float32 [B]: NaN marks a row that could not be
scored, which trains nothing. `longest` is the length of the longest response: with it, columns that are padding in
every row are left out (`response_widths`). `learned` is bool [B]: rows scored by a reward model; only these are
normalised (a row without a reward has score 0). `rewarded`, bool [B] and all true unless given, is false for rows that
nothing rewards: they learn from the KL terms alone and are left out of whitening. The policy as something to generate
with is `forward.with_policy(params, state.trainable, settings.lora_scale)` -> (params, lora).

Every phase compiles once per shape, whatever exit is drawn: exits are traced. The tower runs once per rollout; its
features stay with the rollout, row-aligned, and no gradient reaches tower or projector.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.algorithms import exits as exit_schedules
from icet_jax.algorithms import losses, rewards
from icet_jax.algorithms.advantages import gae, whiten
from icet_jax.algorithms.forward import Scored, score_responses, with_policy
from icet_jax.algorithms.metrics import policy_metrics, rollout_metrics, step_metrics
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import Controls, TrainState, make_optimizer
from icet_jax.algorithms.updates import LossFunction, Outcome, optimise, shuffled_order
from icet_jax.errors import UserError
from icet_jax.generation.decode import generate
from icet_jax.generation.sampling import is_eos
from icet_jax.nn.protocols import Images
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import (
    batch_sharding,
    joined_slices,
    placed,
    replicated,
    row_shards,
    row_slices,
    shardings,
    split_rows,
)
from icet_jax.typing import Array, Bool, Float, Int, Key

# Streams of the run key. Rollout rows use fold_in(fold_in(run_key, iteration), row); these numbers are no iteration's.
_EXIT_STREAM, _SHUFFLE_STREAM = np.uint32(2**32 - 1), np.uint32(2**32 - 2)
_NARROWEST, _SAVING = 32, 0.05  # response columns, and share of all columns: what a narrower program has and saves


class Rollout(NamedTuple):
    """One batch of sampled responses; every leaf is row-aligned.

    Attributes:
      prompts, prompt_mask: [B, P], left-padded.
      visual: what the decoder takes at each row's exit (the tower is not run again).
      exits: int32 [B].
      tokens: int32 [B, A].
      log_probs: float32 [B, A], as the sampler saw them.
      mask: bool [B, A], up to and including EOS; all false for filler rows.
    """

    prompts: Array
    prompt_mask: Array
    visual: Any
    exits: Array
    tokens: Array
    log_probs: Array
    mask: Array


class TrainBatch(NamedTuple):
    """A rollout with everything the update needs held constant; every leaf is row-aligned."""

    prompts: Array
    prompt_mask: Array
    visual: Any
    responses: Array
    mask: Array
    old_log_probs: Array
    old_values: Array
    advantages: Array
    returns: Array


@dataclasses.dataclass(frozen=True)
class Phases:
    """The compiled phases; see the module's docstring for their arguments.

    `lowered` takes what `rollout` takes and gives all three by name, ready to be compiled for these shapes in any order
    and at once; `prepare_arrays` is the jitted part of `prepare`.
    """

    rollout: Program
    prepare: Callable[..., tuple[TrainState, TrainBatch, dict[str, Any]]]
    prepare_arrays: Program
    update: Program
    lowered: Callable[..., Iterator[tuple[str, Any]]]


def draw_exits(
    settings: Settings,
    run_key: Key[Array, ""],
    iteration: int | Int[Array, ""],
    *,
    batch: int,
    num_exits: int,
    default_exit: int,
) -> Int[Array, " B"]:
    """The exits of one iteration's rows, a pure function of (run key, iteration)."""
    key = jax.random.fold_in(jax.random.fold_in(run_key, _EXIT_STREAM), iteration)
    return exit_schedules.sample(
        settings.exits,
        key,
        batch=batch,
        num_exits=num_exits,
        default_exit=default_exit,
        fixed_exit=settings.fixed_exit,
    )


def shuffle_key(run_key: Key[Array, ""], iteration: Int[Array, ""]) -> Key[Array, ""]:
    """The key of one iteration's permutations."""
    return jax.random.fold_in(jax.random.fold_in(run_key, _SHUFFLE_STREAM), iteration)


def build(graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None = None) -> Phases:
    """The phases for one model structure and one `Settings`; nothing is compiled before the first call.

    With a `mesh`, an update returns the state where `parallel.sharding.shardings` puts it; place the first one so too.
    """

    def prepare_columns(*arrays: Any, columns: int | None = None) -> Any:
        return _placed(_prepare(graphdef, settings, *arrays, columns=columns), mesh)

    about = (graphdef, settings, mesh)
    prepare_arrays = Program(prepare_columns, about=about, static="columns")

    def prepare(
        params: Any, state: TrainState, rollout: Rollout, scores: Any, learned: Any, longest: int | None = None,
        rewarded: Any = None,
    ) -> tuple[TrainState, TrainBatch, dict[str, Any]]:  # fmt: skip
        scores, learned = np.asarray(scores, np.float32), np.asarray(learned, bool)
        rewarded = np.ones(scores.shape, bool) if rewarded is None else np.asarray(rewarded, bool)
        given = (params, state.trainable, state.controls, rollout, scores, learned, rewarded)
        width, length = rollout.prompts.shape[1], rollout.mask.shape[1]
        columns = response_columns(width, length, length if longest is None else longest)
        batch, controls, metrics = prepare_arrays(*given, columns=columns)
        return state._replace(controls=controls), batch, metrics

    def sample(*arrays: Any) -> Rollout:
        return _placed(_rollout(graphdef, settings, *arrays), mesh)

    def learn(*arrays: Any) -> tuple[TrainState, dict[str, Any]]:
        return _update(graphdef, settings, mesh, *arrays)

    rollout, update = Program(sample, about=about), Program(learn, about=about, donate=1)

    def lowered(
        params: Any, state: TrainState, images: Any, tokens: Any, mask: Any, exits: Any, key: Any
    ) -> Iterator[tuple[str, Any]]:
        # A phase's results lie where it says, so that none has to be compiled before another. The longest comes first.
        arguments = (params, state, images, tokens, mask, exits, key)
        made = _abstract(rollout.eval_shape(*arguments), mesh)
        rows = tokens.shape[0]
        per_row = (np.zeros(rows, np.float32), np.zeros(rows, bool), np.zeros(rows, bool))
        given = (params, state.trainable, state.controls, made, *per_row)
        widths = response_widths(tokens.shape[1], settings.sampling.max_new_tokens)
        for columns in widths:
            batch, controls, _ = _abstract(prepare_arrays.eval_shape(*given, columns=columns), mesh)
            yield program_name("update", columns), update.lower(params, state._replace(controls=controls), batch, key)
        yield "rollout", rollout.lower(*arguments)
        for columns in widths:
            yield program_name("prepare", columns), prepare_arrays.lower(*given, columns=columns)

    return Phases(rollout=rollout, prepare=prepare, prepare_arrays=prepare_arrays, update=update, lowered=lowered)


def response_widths(prompt: int, response: int) -> list[int | None]:
    """Columns of responses that are learnt from, where none of a batch is longer; None is all, and comes first.

    Each is a program of its own, so there are few: halves, as long as one saves enough of the columns of prompt and
    response together.
    """
    widths: list[int | None] = [None]
    current = response
    while current // 2 >= _NARROWEST and (current - current // 2) >= _SAVING * (prompt + current - 1):
        current //= 2
        widths.append(current)
    return widths


def response_columns(prompt: int, response: int, longest: int) -> int | None:
    """The least of `response_widths` that holds responses of up to `longest` tokens."""
    fitting = [width for width in response_widths(prompt, response) if width is not None and width >= longest]
    return min(fitting, default=None)


def program_name(phase: str, columns: int | None) -> str:
    """What a phase's program for so many response columns is called."""
    return phase if columns is None else f"{phase} of {columns} columns"


def _places(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Where a phase's results lie: rows over the mesh where they divide, all else whole on every device."""
    if type(tree) is tuple:
        return tuple(_places(part, mesh) for part in tree)
    whole = replicated(mesh)
    split = batch_sharding(mesh) if isinstance(tree, Rollout | TrainBatch) else whole
    return jax.tree.map(lambda leaf: whole if leaf.ndim == 0 or leaf.shape[0] % row_shards(mesh) else split, tree)


def _placed(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Inside a phase: its results where `_places` says."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, _places(tree, mesh))


def _abstract(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Abstract results of a phase where they will lie."""
    return tree if mesh is None else placed(tree, _places(tree, mesh))


def outputs(compiled: Any) -> Any:
    """What a compiled phase returns, abstractly; on several devices also where it lies."""

    def abstract(info: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        where = sharding if sharding.num_devices > 1 else None
        return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=where)

    return jax.tree.map(abstract, compiled.out_info, compiled.output_shardings)


def encode_visual(model: Any, images: Images | None, exits: Int[Array, " B"]) -> Any:
    """The tower once, then each row's exit through the projector; constants for everything that follows."""
    if images is None:
        return None
    return jax.lax.stop_gradient(model.visual(model.encode(images), exits))


def _rollout(
    graphdef: Any, settings: Settings, params: Any, state: TrainState, images: Any, tokens: Array, mask: Array,
    exits: Array, run_key: Array,
) -> Rollout:  # fmt: skip
    """Encode, pick the exits, sample. Row keys depend on (run key, iteration, row) alone."""
    policy, lora = with_policy(params, state.trainable, settings.lora_scale)
    model = nnx.merge(graphdef, policy)
    visual = encode_visual(model, images, exits)
    iteration_key = jax.random.fold_in(run_key, state.iteration)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(iteration_key, jnp.arange(tokens.shape[0]))
    out = generate(model, tokens, mask, visual, row_keys, settings.sampling, lora)
    return Rollout(
        prompts=tokens,
        prompt_mask=mask,
        visual=visual,
        exits=exits,
        tokens=out.tokens,
        log_probs=out.log_probs,
        mask=out.mask,
    )


def _score_slice(graphdef: Any, settings: Settings, params: Any, trainable: Any, rows: Rollout) -> tuple[Scored, Array]:
    """The policy's and the reference's view of some rows: (old log-probs, entropy, values), reference log-probs."""
    sampling = settings.sampling
    shared: dict[str, Any] = dict(
        temperature=sampling.temperature, suppress_ids=sampling.suppress_ids, chunk=settings.log_prob_chunk
    )
    inputs = (rows.prompts, rows.prompt_mask, rows.tokens, rows.mask, rows.visual)
    policy, lora = with_policy(params, trainable, settings.lora_scale)
    old = score_responses(nnx.merge(graphdef, policy), lora, trainable["value_head"], *inputs, **shared)
    reference = score_responses(nnx.merge(graphdef, params), None, None, *inputs, **shared)
    return old, reference.log_probs


def _prepare(
    graphdef: Any, settings: Settings, params: Any, trainable: Any, controls: Controls, rollout: Rollout,
    scores: Array, learned: Array, rewarded: Array, *, columns: int | None = None,
) -> tuple[TrainBatch, Controls, dict[str, Any]]:  # fmt: skip
    """Old and reference log-probs, values, token rewards, advantages; whitened over the rollout's rewarded rows.

    With `columns`, the responses are cut to so many: the rest must be padding.
    """
    if columns is not None:
        cut = {name: getattr(rollout, name)[:, :columns] for name in ("tokens", "log_probs", "mask")}
        rollout = rollout._replace(**cut)
    scored = jnp.isfinite(scores) & rollout.mask.any(axis=1)
    mask = rollout.mask & scored[:, None]
    check_divides(settings, mask.shape[0])
    # As many slices as an update has, so that this phase holds no more activations than that one.
    slices = row_slices(rollout, settings.minibatches * settings.accumulation)
    score = functools.partial(_score_slice, graphdef, settings, params, trainable)
    old, ref_log_probs = joined_slices(jax.lax.map(score, slices))
    last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
    last_token = jnp.take_along_axis(rollout.tokens, last[:, None], axis=1)[:, 0]
    has_eos = is_eos(last_token, settings.sampling.eos_ids) & scored
    shaped, normaliser = rewards.shape_scores(
        scores,
        has_eos | ~rewarded,  # what is not rewarded is not penalised either
        controls.normaliser,
        learned=learned,
        valid=scored,
        normalise=settings.normalise,
        clip=settings.clip,
        missing_eos_penalty=settings.missing_eos_penalty,
    )
    kl = rewards.kl_penalty(old.log_probs, ref_log_probs, settings.kl_kind)
    reward = rewards.token_rewards(shaped, kl, mask, kl_coef=controls.kl_coef)
    advantages, returns = gae(
        whiten(reward, mask, shift_mean=False, rows=rewarded) if settings.whiten_rewards else reward,
        old.values,
        mask,
        gamma=settings.gamma,
        lam=settings.lam,
    )
    sequence_kl = rewards.sequence_kl(old.log_probs, ref_log_probs, mask)
    stable = is_stable(settings, jnp.sum(sequence_kl) / jnp.maximum(jnp.sum(scored), 1))
    batch = TrainBatch(
        prompts=rollout.prompts,
        prompt_mask=rollout.prompt_mask,
        visual=rollout.visual,
        responses=rollout.tokens,
        mask=mask & stable,
        old_log_probs=old.log_probs,
        old_values=old.values,
        advantages=whiten(advantages, mask, rows=rewarded) if settings.whiten_advantages else advantages,
        returns=returns,
    )
    metrics = rollout_metrics(
        exits=rollout.exits,
        num_exits=nnx.merge(graphdef, params).num_exits,
        mask=mask,
        scored=scored,
        unscored=rollout.mask.any(axis=1) & ~scored,
        has_eos=has_eos,
        scores=scores,
        shaped=shaped,
        kl=kl,
        sequence_kl=sequence_kl,
        kl_coef=controls.kl_coef,
        log_probs=old.log_probs,
        sampled_log_probs=rollout.log_probs,
        advantages=advantages,
        returns=returns,
    )
    kl_coef = controls.kl_coef
    if settings.kl_adaptive:
        kl_coef = rewards.adaptive_kl_coef(
            kl_coef,
            metrics["objective/kl"],
            jnp.sum(scored),
            target=settings.kl_target,
            horizon=settings.kl_horizon,
        )
    found = controls._replace(kl_coef=kl_coef, normaliser=normaliser)
    kept = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(new), new, old), found, controls)
    return batch, kept, metrics | {"train/unstable": ~stable}


def is_stable(settings: Settings, kl: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a rollout with this mean KL (nats per sequence) is learnt from: it is a number, and within `max_kl`."""
    return jnp.isfinite(kl) & (kl <= settings.max_kl if settings.max_kl else True)


def check_divides(settings: Settings, rows: int) -> None:
    """Raises a `UserError` where the rows of a batch do not divide into mini-batches and slices."""
    if rows % (settings.minibatches * settings.accumulation):
        raise UserError(
            f"config.data.batch_size {rows} does not divide into {settings.minibatches} mini-batches "
            f"of {settings.accumulation} slices; change lppo.minibatches or lppo.accumulation"
        )


def lppo_loss(
    graphdef: Any, settings: Settings, params: Any, trainable: dict[str, Any], rows: TrainBatch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """L = L_policy + c1 * L_value - entropy_coef * entropy (paper), token means over `rows`, and TRL's statistics."""
    policy, lora = with_policy(params, trainable, settings.lora_scale)
    new = score_responses(
        nnx.merge(graphdef, policy),
        lora,
        trainable["value_head"],
        rows.prompts,
        rows.prompt_mask,
        rows.responses,
        rows.mask,
        rows.visual,
        temperature=settings.sampling.temperature,
        suppress_ids=settings.sampling.suppress_ids,
        chunk=settings.log_prob_chunk,
        value_stop_gradient=settings.value_stop_gradient,
    )
    clips: dict[str, Any] = dict(clip_range=settings.clip_range, dual_clip=settings.dual_clip or None)
    policy_term, stats = losses.policy_loss(new.log_probs, rows.old_log_probs, rows.advantages, rows.mask, **clips)
    value_term, value_stats = losses.value_loss(
        new.values, rows.old_values, rows.returns, rows.mask, clip_range=settings.value_clip_range or None
    )
    entropy = losses.masked_mean(new.entropy, rows.mask)
    loss = policy_term + settings.value_coef * value_term
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy
    return loss, stats | {
        "policy": policy_term,
        "value": value_term,
        "entropy": entropy,
        "value_clipfrac": value_stats["clipfrac"],
    }


def _update(
    graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None, params: Any, state: TrainState,
    batch: TrainBatch, run_key: Array,
) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    """K epochs of clipped updates on one rollout; advances the iteration."""
    new_state, outcome = run_epochs(
        lambda trainable, rows: lppo_loss(graphdef, settings, params, trainable, rows),
        settings,
        mesh,
        state,
        batch,
        run_key,
        target_kl=settings.target_kl,
        max_ratio=settings.max_ratio,
    )
    return new_state, policy_metrics(outcome) | step_metrics(state, outcome, settings.optimizer)


def run_epochs(
    loss_function: LossFunction, settings: Settings, mesh: jax.sharding.Mesh | None, state: TrainState, batch: Any,
    run_key: Array, *, target_kl: float = 0.0, max_ratio: float = 0.0,
) -> tuple[TrainState, Outcome]:  # fmt: skip
    """One iteration's epochs x mini-batches x accumulation; L-PPO and L-SFT share it.

    Args:
      loss_function: see `LossFunction`.
      settings: sizes and optimizer.
      mesh: where the state lies, or None on one device.
      state: before the iteration.
      batch: row-aligned, with a `mask` of response tokens, [B, A].
      run_key: of the run.
      target_kl, max_ratio: see `optimise`.

    Returns:
      (the state after the iteration, placed on the mesh as the one before it was; the outcome of its steps).
    """
    order = shuffled_order(
        shuffle_key(run_key, state.iteration),
        rows=batch.mask.shape[0],
        epochs=settings.epochs,
        minibatches=settings.minibatches,
        accumulation=settings.accumulation,
    )

    def on_its_devices(trainable: dict[str, Any], rows: Any) -> Any:
        # The compiler must not lose the split of the rows: every device would compute all of them.
        return loss_function(trainable, rows if mesh is None else split_rows(rows, mesh))

    outcome = optimise(
        on_its_devices,
        make_optimizer(settings.optimizer),
        state.trainable,
        state.opt_state,
        batch,
        jnp.sum(batch.mask, axis=1),
        order,
        target_kl=target_kl,
        max_ratio=max_ratio,
        scale=state.controls.learning_rate_scale,
    )
    state = state._replace(
        trainable=outcome.trainable,
        opt_state=outcome.opt_state,
        iteration=state.iteration + 1,
        updates=state.updates + outcome.applied,
    )
    # Left to itself the compiler may return other shardings, and the next iteration would compile again for them.
    placed = state if mesh is None else jax.lax.with_sharding_constraint(state, shardings(state, mesh))
    return placed, outcome
