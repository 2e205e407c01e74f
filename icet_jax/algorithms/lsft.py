"""L-SFT, an ablation of L-PPO: supervised learning of given answers at drawn exits.

The paper has no such algorithm; it compares with SFT.

One iteration, step by step:

    1. batch        prompts x with images, B rows                                             `training.loop`
    2. exits        l ~ the schedule of `config.lsft.exits`, one per row                      `begin`
    3. targets      y: the refusal for forbidden rows, the known answer for others            `begin`, `pad_targets`
    4. encode       e_1 .. e_N = E(image): the tower once, for all exits                      `_update`
    5. visual       P(e_l), through the same projector at every exit
    6. update       K epochs of mini-batches:  L = -mean over tokens of log pi(y_t | P(e_l), x, y_<t)     `lsft_loss`
    7. metrics      read while the next iteration runs                                        `finish`

`config.lsft.train` says what is trained: the language model, the projector P, or both. If P is trained, step 5 is a
part of `lsft_loss`, computed again with the current P in every optimizer step; the tower still runs once per batch.

No responses are sampled, and there is no reward and no critic. Epochs, mini-batches, accumulation and optimizer are
those of L-PPO. The phase can be used alone:

    update = lsft.build(graphdef, settings)
    targets, target_mask = lsft.pad_targets(token_ids, eos_id=.., length=.., pad_id=..)      # one list of ids per row
    state, metrics = update(params, state, images, tokens, mask, exits, targets, target_mask, run_key)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.algorithms.base import Algorithm, PhaseWork, PlannedPhase, ReadMetrics
from icet_jax.algorithms.forward import with_policy
from icet_jax.algorithms.losses import masked_mean
from icet_jax.algorithms.metrics import step_metrics
from icet_jax.algorithms.phases import (
    check_divides,
    encode_projector_inputs,
    encode_visual,
    evaluate_policy,
    program_name,
    response_columns,
    response_widths,
    run_epochs,
)
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import TrainState
from icet_jax.errors import UserError
from icet_jax.parallel.programs import Program
from icet_jax.typing import Array, Float

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from icet_jax.algorithms.reward_by_kind import RewardByKind
    from icet_jax.evaluation.batching import PromptBatch
    from icet_jax.planning.ahead import AbstractRun
    from icet_jax.vlm import VLM


class TargetBatch(NamedTuple):
    """Holds prompts, image features of each row's exit, and the responses to learn; every leaf is row-aligned.

    If the projector is trained, `visual` is its input in place of the image features.
    """

    prompts: Array
    prompt_mask: Array
    visual: Any
    responses: Array
    mask: Array


def pad_targets(
    token_ids: Sequence[Sequence[int] | None], *, eos_id: int, length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns target responses as arrays: each row's ids, then EOS, then padding.

    Args:
      token_ids: token ids of each row's target, without EOS; None for a row without a target, which trains nothing.
      eos_id: id of the EOS token.
      length: A, the number of columns (`config.lppo.max_new_tokens`).
      pad_id: id of the padding token.

    Returns:
      (tokens int32 [B, A], mask bool [B, A], true up to and including EOS).

    Raises:
      UserError: a target and its EOS are longer than `length`.
    """
    tokens = np.full((len(token_ids), length), pad_id, np.int32)
    mask = np.zeros((len(token_ids), length), bool)
    for row, ids in enumerate(token_ids):
        if ids is None:
            continue
        if len(ids) + 1 > length:
            raise UserError(
                f"target of row {row}: {len(ids)} tokens + EOS exceed config.lppo.max_new_tokens ({length}); raise it"
            )
        tokens[row, : len(ids) + 1] = [*ids, eos_id]
        mask[row, : len(ids) + 1] = True
    return tokens, mask


def build(graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None = None) -> Program:
    """Returns the only phase of L-SFT, a program that donates the state; the module's docstring shows how to call it.

    With a `mesh`, the train state is split over it as `parallel.sharding.shardings` says.
    """

    def learn(*arrays: Any) -> tuple[TrainState, dict[str, Any]]:
        return _update(graphdef, settings, mesh, *arrays)

    return Program(learn, cache_key=(graphdef, settings, mesh), donate=1)


def lsft_loss(
    graphdef: Any, settings: Settings, params: Any, trainable: dict[str, Any], rows: TargetBatch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns the mean negative log-likelihood per target token in nats, at temperature 1, and the mean entropy."""
    if "projector" in trainable and rows.visual is not None:
        policy, _ = with_policy(params, trainable, settings.lora_scale)
        rows = rows._replace(visual=nnx.merge(graphdef, policy).project(rows.visual))
    scored = evaluate_policy(graphdef, settings, params, trainable, rows, temperature=1.0)
    loss = -masked_mean(scored.log_probs, rows.mask)
    return loss, {"entropy": masked_mean(scored.entropy, rows.mask)}


def _update(
    graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None, params: Any, state: TrainState, images: Any,
    tokens: Array, mask: Array, exits: Array, targets: Array, target_mask: Array, run_key: Array,
) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    """Runs steps 4 to 6: image features of each row's exit, then updates as L-PPO does.

    Returns:
      (train state after the iteration, metrics).
    """
    check_divides(settings, tokens.shape[0])
    encode = encode_projector_inputs if "projector" in state.trainable else encode_visual
    batch = TargetBatch(
        prompts=tokens,
        prompt_mask=mask,
        visual=encode(nnx.merge(graphdef, params), images, exits),
        responses=targets,
        mask=target_mask & mask.any(axis=1, keepdims=True),
    )
    new_state, outcome = run_epochs(
        lambda trainable, rows: lsft_loss(graphdef, settings, params, trainable, rows),
        settings,
        mesh,
        state,
        batch,
        run_key,
    )
    metrics = {"policy/entropy_avg": outcome.stats["entropy"], "loss/policy_avg": outcome.stats["loss"]}
    return new_state, metrics | step_metrics(state, outcome, settings.optimizer)


class Lsft(Algorithm):
    """Runs L-SFT on the host; the module's docstring has its steps."""

    def __init__(self, config: "ConfigDict", vlm: "VLM", reward: "RewardByKind"):
        """See `Algorithm`."""
        super().__init__(config, vlm, reward)
        self._refusal = config.lsft.refusal
        self._update = build(vlm.graphdef, self.settings, vlm.mesh)

    def lowered(self, state: TrainState, batch: "PromptBatch") -> Iterator[tuple[str, Any]]:
        """See `Algorithm`."""
        exits = self._exits.eval_shape(self._run_key, state.iteration, state.controls.exits)
        for columns in response_widths(batch.tokens.shape[1], self.settings.sampling.max_new_tokens):
            inputs = self._inputs(batch, exits, *self._targets(batch, columns))
            yield program_name("update", columns), self._update.lower(self._vlm.params, state, *inputs)

    def begin(self, state: TrainState, batch: "PromptBatch") -> tuple[Any, ...]:
        """Runs steps 2 and 3; returns the arguments of the update after params and state."""
        self._watch.start()
        targets, mask = self._targets(batch)
        length = self.settings.sampling.max_new_tokens
        columns = response_columns(batch.tokens.shape[1], length, int(mask.sum(axis=1).max()))
        exits = self._exits(self._run_key, state.iteration, state.controls.exits)
        return self._inputs(batch, exits, targets[:, :columns], mask[:, :columns])

    def finish(self, state: TrainState, batch: "PromptBatch", inputs: Sequence[Any]) -> tuple[TrainState, ReadMetrics]:
        """Runs steps 4 to 7; see `Algorithm`."""
        *_, target_mask, _ = inputs
        return self._learn_from_given(self._update, state, batch, inputs, target_mask.sum(axis=1))

    def _targets(self, batch: "PromptBatch", columns: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns token ids and mask of the rows' targets, cut to the first `columns` columns (None: all)."""
        sampling = self.settings.sampling
        texts = [self._refusal if row.kind == "forbidden" else row.answer for row in batch.examples]
        tokenizer = self._vlm.processor.tokenizer
        ids = [None if text is None else tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        targets, mask = pad_targets(
            ids, eos_id=sampling.eos_ids[0], length=sampling.max_new_tokens, pad_id=sampling.pad_id
        )
        return targets[:, :columns], mask[:, :columns]

    def _inputs(self, batch: "PromptBatch", exits: Any, targets: Any, mask: Any) -> tuple[Any, ...]:
        """Returns the arguments of the update after params and state."""
        return (batch.images, batch.tokens, batch.mask, exits, targets, mask, self._run_key)

    @classmethod
    def planned(cls, run: "AbstractRun", get_program: Callable[[PlannedPhase], Any]) -> Iterator[PlannedPhase]:
        """See `Algorithm`."""
        vlm, settings, state = run.vlm, run.settings, run.state
        batch, length = run.config.data.batch_size, run.settings.sampling.max_new_tokens
        check_divides(settings, batch)
        update: Any = build(vlm.graphdef, settings, run.devices)
        images, (tokens, mask) = run.images(batch), run.prompts(batch)
        targets = tuple(jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, jnp.bool_))
        inputs = (images, tokens, mask, run.exits(batch), *targets)
        yield PlannedPhase(
            "update", inputs, None, lambda: update.jitted.lower(vlm.params, state, *inputs, run.key),
            run.replaced_weights(),
        )  # fmt: skip

    @classmethod
    def work(cls, run: "AbstractRun") -> Mapping[str, PhaseWork]:
        """See `Algorithm`."""
        encode, update = run.encode_flops(), run.update_work()
        return {"update": update._replace(flops=encode + update.flops)}


ALGORITHM = Lsft
