"""What the compiled phases of all algorithms share: keys, rollouts, slices, the epochs of updates, and placement.

Every phase is a pure function of explicit pytrees and compiles once per shape, whatever exit is drawn: exits are traced
(`forward.with_policy` gives the policy as something to generate with). The tower runs once per batch; its features
stay with the rows, and no gradient reaches tower or projector.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.algorithms.exits import Schedule, schedule
from icet_jax.algorithms.forward import with_policy
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import Controls, TrainState, make_optimizer
from icet_jax.algorithms.updates import LossFunction, UpdateResult, optimise, shuffled_order
from icet_jax.errors import UserError
from icet_jax.generation.decode import generate, repeat_rows
from icet_jax.nn.protocols import Images
from icet_jax.parallel.sharding import batch_sharding, placed, replicated, row_shards, shardings, split_rows
from icet_jax.typing import Array, Bool, Float, Int, Key

# Streams of the run key. Rollout rows use fold_in(fold_in(run_key, iteration), row); these numbers are no iteration's.
_EXIT_STREAM, _SHUFFLE_STREAM = np.uint32(2**32 - 1), np.uint32(2**32 - 2)
# A narrower program must have at least so many response columns, and save at least this share of all columns.
_NARROWEST, _SAVING = 32, 0.05


class Rollout(NamedTuple):
    """One batch of sampled responses; every leaf is row-aligned.

    Attributes:
      prompts, prompt_mask: [B, P], left-padded.
      visual: what the decoder takes at each row's exit (the tower is not run again).
      exits: int32 [B].
      tokens: int32 [B, A].
      log_probs: float32 [B, A], as the sampler saw them.
      mask: bool [B, A], up to and including EOS; all false for filler rows.
      anchor_visual: what the decoder takes at the default exit; None where nothing is anchored to it.
    """

    prompts: Array
    prompt_mask: Array
    visual: Any
    exits: Array
    tokens: Array
    log_probs: Array
    mask: Array
    anchor_visual: Any = None


def draw_exits(
    settings: Settings,
    run_key: Key[Array, ""],
    iteration: int | Int[Array, ""],
    learned: Any = None,
    *,
    batch: int,
    num_exits: int,
    default_exit: int,
) -> Int[Array, " B"]:
    """The exits of one iteration's rows, a pure function of (run key, iteration, state of the schedule `learned`)."""
    key = jax.random.fold_in(jax.random.fold_in(run_key, _EXIT_STREAM), iteration)
    return exit_schedule(settings, num_exits, default_exit).draw(key, learned, batch=batch)


def exit_schedule(settings: Settings, num_exits: int, default_exit: int) -> Schedule:
    """Returns the exit schedule that `settings` name, for a model with these exits."""
    return schedule(
        settings.exits,
        num_exits=num_exits,
        default_exit=default_exit,
        fixed_exit=settings.fixed_exit,
        train_exits=settings.train_exits,
    )


def observe_failures(
    settings: Settings, controls: Controls, model: Any, exits: Int[Array, " B"], failures: Float[Array, " B"] | None
) -> Controls:
    """Returns the controls after the exit schedule has seen a rollout; the same where it learns nothing.

    Args:
      settings: name the schedule.
      controls: before the rollout.
      model: the network, which has the exits.
      exits: of the rollout's rows.
      failures: see `exits.Schedule.observe`; None where the schedule learns nothing.
    """
    if controls.exits is None or failures is None:
        return controls
    drawer = exit_schedule(settings, model.num_exits, model.default_exit)
    return controls._replace(exits=drawer.observe(controls.exits, exits, failures))


def shuffle_key(run_key: Key[Array, ""], iteration: Int[Array, ""]) -> Key[Array, ""]:
    """The key of one iteration's permutations."""
    return jax.random.fold_in(jax.random.fold_in(run_key, _SHUFFLE_STREAM), iteration)


def encode_visual(model: Any, images: Images | None, exits: Int[Array, " B"]) -> Any:
    """The tower once, then each row's exit through the projector; constants for everything that follows."""
    return _visuals(model, images, exits)[0]


def _visuals(model: Any, images: Images | None, *exits: Int[Array, " B"]) -> list[Any]:
    """What the decoder takes at each of several exits; the tower runs once."""
    if images is None:
        return [None] * len(exits)
    encoded = model.encode(images)
    return [jax.lax.stop_gradient(model.visual(encoded, chosen)) for chosen in exits]


def sample_responses(
    graphdef: Any, settings: Settings, params: Any, state: TrainState, images: Images | None, tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"], exits: Int[Array, " B"], run_key: Key[Array, ""], *, anchored: bool = False,
    by_reference: bool = False, group_size: int = 1,
) -> Rollout:  # fmt: skip
    """Encodes, picks the exits and samples responses: `group_size` of each prompt, which are neighbours in the rollout.

    The image encoder and the prefill run once per prompt.

    Args:
      graphdef: structure of the network.
      settings: what the phase is compiled for.
      params: the frozen model.
      state: the train state, whose policy answers.
      images: `nn.protocols.Images` with num_rows == B, or None where no row has one.
      tokens, mask: left-padded prompts; a filler row has an all-false mask.
      exits: of each row.
      run_key: keys of responses depend on (run key, iteration, row of the rollout) alone.
      anchored: whether the default exit's `anchor_visual` is kept too.
      by_reference: whether the answers are those of the frozen model at its default exit; needs `anchored`.
      group_size: k, responses of each prompt.

    Returns:
      The rollout, of k B rows.
    """
    policy, lora = (params, None) if by_reference else with_policy(params, state.trainable, settings.lora_scale)
    model = nnx.merge(graphdef, policy)
    drawn = (exits, jnp.full_like(exits, model.default_exit)) if anchored else (exits,)
    visual, anchor_visual = [*_visuals(model, images, *drawn), None][:2]
    iteration_key = jax.random.fold_in(run_key, state.iteration)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(iteration_key, jnp.arange(tokens.shape[0] * group_size))
    seen = anchor_visual if by_reference else visual
    out = generate(model, tokens, mask, seen, row_keys, settings.sampling, lora)
    prompts = (tokens, mask, visual, exits, anchor_visual)
    tokens, mask, visual, exits, anchor_visual = repeat_rows(prompts, group_size)
    return Rollout(
        prompts=tokens,
        prompt_mask=mask,
        visual=visual,
        exits=exits,
        tokens=out.tokens,
        log_probs=out.log_probs,
        mask=out.mask,
        anchor_visual=anchor_visual,
    )


def cut_columns(rollout: Rollout, columns: int | None) -> Rollout:
    """The rollout with its first `columns` response columns; what is cut must be padding. None is all."""
    if columns is None:
        return rollout
    return rollout._replace(**{name: getattr(rollout, name)[:, :columns] for name in ("tokens", "log_probs", "mask")})


def check_divides(settings: Settings, rows: int) -> None:
    """Raises a `UserError` where the rows of a batch do not divide into mini-batches and slices."""
    if rows % (settings.minibatches * settings.accumulation):
        raise UserError(
            f"config.data.batch_size {rows} does not divide into {settings.minibatches} mini-batches "
            f"of {settings.accumulation} slices; change lppo.minibatches or lppo.accumulation"
        )


def run_epochs(
    loss_function: LossFunction, settings: Settings, mesh: jax.sharding.Mesh | None, state: TrainState, batch: Any,
    run_key: Array, *, target_kl: float = 0.0, max_ratio: float = 0.0,
) -> tuple[TrainState, UpdateResult]:  # fmt: skip
    """One iteration's epochs x mini-batches x accumulation; all algorithms share it.

    Args:
      loss_function: see `LossFunction`.
      settings: sizes and optimizer.
      mesh: where the state lies, or None on one device.
      state: before the iteration.
      batch: row-aligned, with a `mask` of what the loss is a mean over: response tokens [B, A], or pairs [B, 1].
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
    on_mesh = state if mesh is None else jax.lax.with_sharding_constraint(state, shardings(state, mesh))
    return on_mesh, outcome


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
    """Where a phase's results lie: batches by rows over the mesh where they divide, all else whole on every device."""
    if type(tree) is tuple:
        return tuple(_places(part, mesh) for part in tree)
    whole = replicated(mesh)
    split = batch_sharding(mesh) if "prompts" in getattr(tree, "_fields", ()) else whole
    return jax.tree.map(lambda leaf: whole if leaf.ndim == 0 or leaf.shape[0] % row_shards(mesh) else split, tree)


def placed_results(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Inside a phase: its results placed, so that no phase has to be compiled before the one that takes them.

    A batch (a NamedTuple with `prompts`) is split by rows; a tuple is placed part by part; all else is whole on every
    device.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, _places(tree, mesh))


def abstract_results(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Abstract results of a phase where `placed_results` puts them."""
    return tree if mesh is None else placed(tree, _places(tree, mesh))


def outputs(compiled: Any) -> Any:
    """What a compiled phase returns, abstractly; on several devices also where it lies."""

    def abstract(info: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        where = sharding if sharding.num_devices > 1 else None
        return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=where)

    return jax.tree.map(abstract, compiled.out_info, compiled.output_shardings)
