"""What the compiled phases of all algorithms share: random keys, rollouts, epochs of updates, and sharding of results.

Every phase is a pure function of explicit pytrees and compiles once per shape, whatever exit is drawn, because exits
are traced. The image encoder runs once per batch, and no gradient reaches it. A gradient reaches the projector only if
an algorithm trains it (L-SFT).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.algorithms.exits import Schedule, schedule
from icet_jax.algorithms.forward import Anchor, TokenValues, evaluate_responses, with_policy
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import Controls, TrainState, make_optimizer
from icet_jax.algorithms.updates import LossFunction, UpdateResult, optimise, shuffled_order
from icet_jax.errors import UserError
from icet_jax.generation.decode import generate, repeat_rows
from icet_jax.nn.protocols import Images
from icet_jax.parallel.sharding import batch_sharding, placed, replicated, row_shards, shardings, split_rows
from icet_jax.typing import Array, Bool, Float, Int, Key

# Folded into the run key for exits and for shuffling. Rollouts fold in the iteration, which never gets that large.
_EXIT_STREAM, _SHUFFLE_STREAM = np.uint32(2**32 - 1), np.uint32(2**32 - 2)
# A narrower program must have at least so many response columns, and save at least this share of all columns.
_NARROWEST, _SAVING = 32, 0.05


class Rollout(NamedTuple):
    """Holds one batch of sampled responses; every leaf is row-aligned.

    Attributes:
      prompts, prompt_mask: [B, P], left-padded.
      visual: image features of each row's exit.
      exits: int32 [B], exit of each row.
      tokens: int32 [B, A], the responses.
      log_probs: float32 [B, A], log-probs of the tokens as computed while sampling.
      mask: bool [B, A], true up to and including EOS; all false for filler rows.
      anchor_visual: image features of the default exit; None if they are not needed.
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
    """Returns the exits of one iteration's rows, int32 [batch].

    They are a pure function of the run key, the iteration and `learned`, the state of the exit schedule.
    """
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
    """Returns the controls with the exit schedule's state after a rollout; unchanged if the schedule learns nothing.

    Args:
      settings: settings, which name the schedule.
      controls: controls before the rollout.
      model: the network.
      exits: exits of the rollout's rows.
      failures: see `exits.Schedule.observe`; None if the schedule learns nothing.
    """
    if controls.exits is None or failures is None:
        return controls
    drawer = exit_schedule(settings, model.num_exits, model.default_exit)
    return controls._replace(exits=drawer.observe(controls.exits, exits, failures))


def shuffle_key(run_key: Key[Array, ""], iteration: Int[Array, ""]) -> Key[Array, ""]:
    """Returns the random key of one iteration's permutations of rows."""
    return jax.random.fold_in(jax.random.fold_in(run_key, _SHUFFLE_STREAM), iteration)


def encode_visual(model: Any, images: Images | None, exits: Int[Array, " B"]) -> Any:
    """Returns the image features of each row at its exit, without gradient; None without images."""
    return _visuals(model, images, exits)[0]


def encode_projector_inputs(model: Any, images: Images | None, exits: Int[Array, " B"]) -> Any:
    """Returns what the projector takes of each row's images at its exit, without gradient; None without images."""
    return None if images is None else jax.lax.stop_gradient(model.projector_inputs(model.encode(images), exits))


def _visuals(model: Any, images: Images | None, *exits: Int[Array, " B"]) -> list[Any]:
    """Returns one array of image features for each element of `exits`; the image encoder runs only once."""
    if images is None:
        return [None] * len(exits)
    encoded = model.encode(images)
    return [jax.lax.stop_gradient(model.visual(encoded, row_exits)) for row_exits in exits]


def sample_responses(
    graphdef: Any, settings: Settings, params: Any, state: TrainState, images: Images | None, tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"], exits: Int[Array, " B"], run_key: Key[Array, ""], *, anchored: bool = False,
    by_reference: bool = False, group_size: int = 1,
) -> Rollout:  # fmt: skip
    """Samples `group_size` responses to each prompt at its exit; they become consecutive rows of the rollout.

    The image encoder and the prefill run once per prompt.

    Args:
      graphdef: structure of the network.
      settings: settings that the phase is compiled for.
      params: parameters of the model before training.
      state: the train state; its policy generates the responses.
      images: `nn.protocols.Images` with num_rows == B, or None if no row has an image.
      tokens, mask: left-padded prompts; the mask of a filler row is all false.
      exits: exit of each prompt.
      run_key: random key of the run; a response's key depends on it, the iteration and the row of the rollout.
      anchored: whether to compute `Rollout.anchor_visual`.
      by_reference: whether the model before training generates the responses, at its default exit; needs `anchored`.
      group_size: k, the number of responses to each prompt.

    Returns:
      The rollout, of k B rows.
    """
    policy, lora = (params, None) if by_reference else with_policy(params, state.trainable, settings.lora_scale)
    model = nnx.merge(graphdef, policy)
    if anchored:
        visual, anchor_visual = _visuals(model, images, exits, jnp.full_like(exits, model.default_exit))
    else:
        (visual,), anchor_visual = _visuals(model, images, exits), None
    iteration_key = jax.random.fold_in(run_key, state.iteration)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(iteration_key, jnp.arange(tokens.shape[0] * group_size))
    out = generate(model, tokens, mask, anchor_visual if by_reference else visual, row_keys, settings.sampling, lora)
    per_prompt = {
        "prompts": tokens,
        "prompt_mask": mask,
        "visual": visual,
        "exits": exits,
        "anchor_visual": anchor_visual,
    }
    return Rollout(
        tokens=out.tokens, log_probs=out.log_probs, mask=out.mask, **repeat_rows(per_prompt, group_size)
    )  # fmt: skip


def cut_columns(rollout: Rollout, columns: int | None) -> Rollout:
    """Returns the rollout with only its first `columns` response columns, or all of them if None.

    The other columns must be padding in every row.
    """
    if columns is None:
        return rollout
    return rollout._replace(**{name: getattr(rollout, name)[:, :columns] for name in ("tokens", "log_probs", "mask")})


def evaluate_policy(
    graphdef: Any, settings: Settings, params: Any, trainable: dict[str, Any], rows: Any, *, temperature: float,
    anchor_hidden: Array | None = None,
) -> TokenValues:  # fmt: skip
    """Returns log-probs, entropies and (with a value head) values of given responses under the policy.

    Args:
      graphdef: structure of the network.
      settings: settings that the phase is compiled for.
      params: parameters of the model before training.
      trainable: trained weights.
      rows: rows with prompts, prompt_mask, responses, mask and visual.
      temperature: temperature of the log-probs.
      anchor_hidden: [B, A, E], final hidden states of the model `params` at another exit. The KL from the distribution
        that they give is computed as well (`TokenValues.anchor_kl`); None computes no KL.
    """
    policy, lora = with_policy(params, trainable, settings.lora_scale)
    return evaluate_responses(
        nnx.merge(graphdef, policy),
        lora,
        trainable.get("value_head"),
        rows.prompts,
        rows.prompt_mask,
        rows.responses,
        rows.mask,
        rows.visual,
        temperature=temperature,
        suppress_ids=settings.sampling.suppress_ids,
        chunk=settings.log_prob_chunk,
        value_stop_gradient=settings.value_stop_gradient,
        anchor=None if anchor_hidden is None else Anchor(nnx.merge(graphdef, params), anchor_hidden),
    )


def check_divides(settings: Settings, rows: int) -> None:
    """Raises a `UserError` if the rows of a batch do not divide into mini-batches and slices of equal size."""
    if rows % (settings.minibatches * settings.accumulation):
        raise UserError(
            f"config.data.batch_size {rows} does not divide into {settings.minibatches} mini-batches "
            f"of {settings.accumulation} slices; change lppo.minibatches or lppo.accumulation"
        )


def run_epochs(
    loss_function: LossFunction, settings: Settings, mesh: jax.sharding.Mesh | None, state: TrainState, batch: Any,
    run_key: Array, *, target_kl: float = 0.0, max_ratio: float = 0.0,
) -> tuple[TrainState, UpdateResult]:  # fmt: skip
    """Runs all optimizer steps of one iteration: its epochs, their mini-batches, and the slices of each.

    Args:
      loss_function: see `LossFunction`.
      settings: number of epochs, mini-batches and slices, and the optimizer.
      mesh: mesh of the state; None on one device.
      state: train state before the iteration.
      batch: row-aligned pytree; the loss is a mean over its `mask`: response tokens [B, A], or pairs [B, 1].
      run_key: random key of the run.
      target_kl, max_ratio: see `optimise`.

    Returns:
      (train state after the iteration with the same sharding, result of the steps).
    """
    order = shuffled_order(
        shuffle_key(run_key, state.iteration),
        rows=batch.mask.shape[0],
        epochs=settings.epochs,
        minibatches=settings.minibatches,
        accumulation=settings.accumulation,
    )

    def on_its_devices(trainable: dict[str, Any], rows: Any) -> Any:
        # Without this constraint the compiler may drop the split of the rows, and every device would compute all.
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
    # Otherwise the compiler may choose other shardings, for which the next iteration would have to compile again.
    on_mesh = state if mesh is None else jax.lax.with_sharding_constraint(state, shardings(state, mesh))
    return on_mesh, outcome


def response_widths(prompt: int, response: int) -> list[int | None]:
    """Returns for how many response columns programs are compiled; the first entry is None, which means all columns.

    A batch whose longest response is short runs a program with fewer columns. Every program has to be compiled, so only
    few are offered: the number of columns is halved as long as that saves enough of all columns (`_SAVING`).

    Args:
      prompt: number of prompt columns.
      response: number of response columns.
    """
    widths: list[int | None] = [None]
    current = response
    while current // 2 >= _NARROWEST and (current - current // 2) >= _SAVING * (prompt + current - 1):
        current //= 2
        widths.append(current)
    return widths


def response_columns(prompt: int, response: int, longest: int) -> int | None:
    """Returns the smallest of `response_widths` that is enough for responses of up to `longest` tokens; None is all."""
    fitting = [width for width in response_widths(prompt, response) if width is not None and width >= longest]
    return min(fitting, default=None)


def program_name(phase: str, columns: int | None) -> str:
    """Returns the name of a phase's program for this number of response columns (None: all)."""
    return phase if columns is None else f"{phase} of {columns} columns"


def _result_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the shardings of a phase's results: batches are split by rows if divisible; the rest is replicated."""
    if type(tree) is tuple:
        return tuple(_result_shardings(part, mesh) for part in tree)
    whole = replicated(mesh)
    split = batch_sharding(mesh) if "prompts" in getattr(tree, "_fields", ()) else whole
    return jax.tree.map(lambda leaf: whole if leaf.ndim == 0 or leaf.shape[0] % row_shards(mesh) else split, tree)


def placed_results(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Returns the results of a phase with fixed shardings; to be called inside the phase.

    Because the shardings are known beforehand, the phase that takes these results can be compiled at the same time as
    the phase that returns them. A batch (a NamedTuple with `prompts`) is split by rows, and other tuples are treated
    element by element. Everything else is replicated.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, _result_shardings(tree, mesh))


def abstract_results(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Returns abstract results of a phase with the shardings of `placed_results`."""
    return tree if mesh is None else placed(tree, _result_shardings(tree, mesh))


def outputs(compiled: Any) -> Any:
    """Returns the results of a compiled phase as abstract arrays, which on several devices carry their shardings."""

    def abstract(info: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding if sharding.num_devices > 1 else None)

    return jax.tree.map(abstract, compiled.out_info, compiled.output_shardings)
