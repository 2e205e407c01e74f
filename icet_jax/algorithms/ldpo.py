"""L-DPO: direct preference optimisation at exits, which prefers the model's own answers at its default exit.

The paper has no such algorithm.

The pairs are created once, before the first iteration (`runs.pairs`, `evaluation.harvest`): the model before training
answers the prompts of the run's batches at its default exit and at the exits of the schedule of `config.ldpo.exits`.

    forbidden row        chosen: the default exit's refusal          rejected: exit l's answer, which does not refuse
    benign or VQA row    chosen: the default exit's answer           rejected: a refusal of a forbidden row

One iteration, step by step; pi is the policy, pi_ref the model before training, P the projector:

    1. batch        pairs (x, image, l, y+, y-), B rows, in the mixture of kinds              `training.loop`
    2. answers      y+ and y- as tokens, each with its EOS                                    `begin`, `pad_answers`
    3. encode       e_1 .. e_N = E(image): the tower once, for all exits                      `_update`
    4. visual       P(e_l), through the same projector at every exit
    5. reference    log pi_ref(y+ | P(e_l), x), log pi_ref(y- | P(e_l), x)
    6. update       K epochs of mini-batches:                                                 `ldpo_loss`
                    L = -E[log sigmoid(beta (log pi(y+ | P(e_l), x) - log pi_ref(y+ | P(e_l), x))
                                       - beta (log pi(y- | P(e_l), x) - log pi_ref(y- | P(e_l), x)))]
                        - c E[log pi(y+ | P(e_l), x) / |y+|]          c: `config.ldpo.sft_coef`, 0 is plain DPO
    7. metrics      read while the next iteration runs                                        `finish`

The first term is equation 7 of Rafailov et al. 2023 (arXiv 2305.18290) with every probability conditioned on the exit,
the second that of Pang et al. 2024 (arXiv 2404.19733). Without the second term refusals get garbled, because the pairs
of benign rows make the words of refusals less likely. Both answers of a pair are rows of one teacher-forced pass. There
is no reward and no critic. Epochs, mini-batches, accumulation, temperature and optimizer are those of L-PPO. The
default exit has to be safe, because every exit learns the answers of that exit. The phase can be used alone:

    update = ldpo.build(graphdef, settings, beta=.., sft_coef=..)
    answers, answer_mask = ldpo.pad_answers(token_ids, length=..)         # lists of ids, chosen and rejected in turn
    state, metrics = update(params, state, images, tokens, mask, exits, answers, answer_mask, run_key)
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.algorithms.base import Algorithm, PhaseWork, PlannedPhase, ReadMetrics
from icet_jax.algorithms.forward import evaluate_responses, with_policy
from icet_jax.algorithms.losses import dpo_loss, masked_mean
from icet_jax.algorithms.metrics import step_metrics
from icet_jax.algorithms.phases import (
    check_divides,
    encode_visual,
    program_name,
    response_columns,
    response_widths,
    run_epochs,
)
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import TrainState
from icet_jax.data.padding import pad_rows
from icet_jax.data.pairs import ExitPair
from icet_jax.nn.layers import Lora
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import joined_slices, row_slices
from icet_jax.typing import Array, Float

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from icet_jax.algorithms.reward_by_kind import RewardByKind
    from icet_jax.evaluation.batching import PromptBatch
    from icet_jax.planning.ahead import AbstractRun
    from icet_jax.vlm import VLM


class PairBatch(NamedTuple):
    """Holds prompts with two answers each, the chosen one first; every leaf is row-aligned.

    Attributes:
      prompts, prompt_mask: [B, P], left-padded.
      visual: image features of each row's exit.
      answers: int32 [B, 2, A].
      answer_mask: bool [B, 2, A], true at the tokens of an answer up to and including EOS.
      mask: bool [B, 1], false for filler rows.
      ref_log_probs: float32 [B, 2], log-probs of whole answers under the reference; None until they are computed.
    """

    prompts: Array
    prompt_mask: Array
    visual: Any
    answers: Array
    answer_mask: Array
    mask: Array
    ref_log_probs: Any = None


def answer_ids(tokenizer: Any, text: str, *, eos_id: int, length: int) -> list[int] | None:
    """Returns the token ids of an answer with EOS; None if it has more than `length` tokens.

    An answer of exactly `length` tokens gets no EOS, because an answer of that length was cut off when it was sampled.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > length:
        return None
    return ids if len(ids) == length else [*ids, eos_id]


def pad_answers(token_ids: Sequence[Sequence[int]], *, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens int32, mask bool), [B, 2, length], of 2 B answers: each row's chosen, then its rejected one."""
    answers, mask = pad_rows(token_ids, length, len(token_ids))
    return answers.reshape(-1, 2, length), mask.reshape(-1, 2, length)


def build(
    graphdef: Any, settings: Settings, *, beta: float, sft_coef: float, mesh: jax.sharding.Mesh | None = None
) -> Program:
    """Returns the only phase of L-DPO, a program that donates the state; the module's docstring shows how to call it.

    Args:
      graphdef: structure of the network.
      settings: settings that the phase is compiled for.
      beta, sft_coef: fields of `config.ldpo`.
      mesh: mesh over which the train state is split as `parallel.sharding.shardings` says; None on one device.
    """

    def learn(*arrays: Any) -> tuple[TrainState, dict[str, Any]]:
        return _update(graphdef, settings, beta, sft_coef, mesh, *arrays)

    return Program(learn, cache_key=(graphdef, settings, beta, sft_coef, mesh), donate=1)


def ldpo_loss(
    graphdef: Any, settings: Settings, beta: float, sft_coef: float, params: Any, trainable: dict[str, Any],
    rows: PairBatch,
) -> tuple[Float[Array, ""], dict[str, Array]]:  # fmt: skip
    """Returns the loss of step 6, a mean over the pairs of `rows`, and statistics: its two terms, and `dpo_loss`'s."""
    policy, lora = with_policy(params, trainable, settings.lora_scale)
    log_probs = _answer_log_probs(nnx.merge(graphdef, policy), lora, settings, rows)
    loss, stats = dpo_loss(log_probs, rows.ref_log_probs, rows.mask[:, 0], beta=beta)
    tokens = jnp.maximum(jnp.sum(rows.answer_mask[:, :1], axis=2), 1)
    sft = -masked_mean(log_probs[:, :1] / tokens, rows.mask)
    return loss + sft_coef * sft, stats | {"dpo": loss, "sft": sft}


def _answer_log_probs(model: Any, lora: Lora | None, settings: Settings, rows: PairBatch) -> Float[Array, "B 2"]:
    """Returns the log-probs of whole answers in nats.

    The two answers of a row are neighbouring rows of one pass, so that no row has to move to another device.
    """

    def twice(leaf: Array) -> Array:
        return jnp.repeat(leaf, 2, axis=0)

    def flat(leaf: Array) -> Array:
        return leaf.reshape(-1, leaf.shape[-1])

    mask = flat(rows.answer_mask)
    scored = evaluate_responses(
        model,
        lora,
        None,
        twice(rows.prompts),
        twice(rows.prompt_mask),
        flat(rows.answers),
        mask,
        jax.tree.map(twice, rows.visual),
        temperature=settings.sampling.temperature,
        suppress_ids=settings.sampling.suppress_ids,
        chunk=settings.log_prob_chunk,
    )
    return jnp.sum(jnp.where(mask, scored.log_probs, 0.0), axis=1).reshape(-1, 2)


def _update(
    graphdef: Any, settings: Settings, beta: float, sft_coef: float, mesh: jax.sharding.Mesh | None, params: Any,
    state: TrainState, images: Any, tokens: Array, mask: Array, exits: Array, answers: Array, answer_mask: Array,
    run_key: Array,
) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    """Runs steps 3 to 6: image features, the reference's log-probs, then updates as L-PPO does.

    Returns:
      (train state after the iteration, metrics).
    """
    check_divides(settings, tokens.shape[0])
    batch = PairBatch(
        prompts=tokens,
        prompt_mask=mask,
        visual=encode_visual(nnx.merge(graphdef, params), images, exits),
        answers=answers,
        answer_mask=answer_mask,
        mask=mask.any(axis=1, keepdims=True) & answer_mask.any(axis=2).all(axis=1, keepdims=True),
    )

    # 5. The reference's log-probs, computed in as many slices as an update has.
    slices = row_slices(batch, settings.minibatches * settings.accumulation)
    score = functools.partial(_answer_log_probs, nnx.merge(graphdef, params), None, settings)
    batch = batch._replace(ref_log_probs=joined_slices(jax.lax.map(score, slices)))

    # 6. K epochs of mini-batches.
    new_state, outcome = run_epochs(
        lambda trainable, rows: ldpo_loss(graphdef, settings, beta, sft_coef, params, trainable, rows),
        settings,
        mesh,
        state,
        batch,
        run_key,
    )
    metrics = {f"rewards/{name}": outcome.stats[name] for name in ("chosen", "rejected", "margins", "accuracies")}
    metrics |= {"loss/dpo_avg": outcome.stats["dpo"], "loss/sft_avg": outcome.stats["sft"]}
    return new_state, metrics | step_metrics(state, outcome, settings.optimizer)


class Ldpo(Algorithm):
    """Runs L-DPO on the host; the module's docstring has its steps."""

    paired = True

    def __init__(self, config: "ConfigDict", vlm: "VLM", reward: "RewardByKind"):
        """See `Algorithm`."""
        super().__init__(config, vlm, reward)
        coefficients = {"beta": config.ldpo.beta, "sft_coef": config.ldpo.sft_coef}
        self._update = build(vlm.graphdef, self.settings, **coefficients, mesh=vlm.mesh)

    def lowered(self, state: TrainState, batch: "PromptBatch") -> Iterator[tuple[str, Any]]:
        """See `Algorithm`."""
        answers, mask = self._answers(batch)
        for columns in response_widths(batch.tokens.shape[1], self.settings.sampling.max_new_tokens):
            inputs = self._inputs(batch, answers[..., :columns], mask[..., :columns])
            yield program_name("update", columns), self._update.lower(self._vlm.params, state, *inputs)

    def begin(self, state: TrainState, batch: "PromptBatch") -> tuple[Any, ...]:
        """Runs step 2; returns the arguments of the update after params and state."""
        self._watch.start()
        answers, mask = self._answers(batch)
        length = self.settings.sampling.max_new_tokens
        columns = response_columns(batch.tokens.shape[1], length, int(mask.sum(axis=2).max()))
        return self._inputs(batch, answers[..., :columns], mask[..., :columns])

    def finish(self, state: TrainState, batch: "PromptBatch", inputs: Sequence[Any]) -> tuple[TrainState, ReadMetrics]:
        """Runs steps 3 to 7; see `Algorithm`."""
        *_, response_mask, _ = inputs
        return self._learn_from_given(self._update, state, batch, inputs, response_mask.sum(axis=2), passes=1)

    def _answers(self, batch: "PromptBatch") -> tuple[np.ndarray, np.ndarray]:
        """Returns token ids and mask of both answers of every row; `runs.pairs` has left out rows that do not fit."""
        sampling, tokenizer = self.settings.sampling, self._vlm.processor.tokenizer
        pairs = [row for row in batch.examples if isinstance(row, ExitPair)]
        ids = [
            answer_ids(tokenizer, text, eos_id=sampling.eos_ids[0], length=sampling.max_new_tokens) or []
            for pair in pairs
            for text in (pair.chosen, pair.rejected)
        ]
        return pad_answers(ids, length=sampling.max_new_tokens)

    def _inputs(self, batch: "PromptBatch", answers: np.ndarray, mask: np.ndarray) -> tuple[Any, ...]:
        """Returns the arguments of the update after params and state."""
        exits = np.array([row.exit_layer for row in batch.examples if isinstance(row, ExitPair)], np.int32)
        return (batch.images, batch.tokens, batch.mask, exits, answers, mask, self._run_key)

    @classmethod
    def planned(cls, run: "AbstractRun", get_program: Callable[[PlannedPhase], Any]) -> Iterator[PlannedPhase]:
        """See `Algorithm`."""
        vlm, settings, state = run.vlm, run.settings, run.state
        batch, length = run.config.data.batch_size, run.settings.sampling.max_new_tokens
        check_divides(settings, batch)
        coefficients = {"beta": run.config.ldpo.beta, "sft_coef": run.config.ldpo.sft_coef}
        update: Any = build(vlm.graphdef, settings, **coefficients, mesh=run.devices)
        images, (tokens, mask) = run.images(batch), run.prompts(batch)
        answers = tuple(jax.ShapeDtypeStruct((batch, 2, length), dtype) for dtype in (jnp.int32, jnp.bool_))
        inputs = (images, tokens, mask, run.exits(batch), *answers)
        yield PlannedPhase("update", inputs, None, lambda: update.jitted.lower(vlm.params, state, *inputs, run.key))

    @classmethod
    def work(cls, run: "AbstractRun") -> Mapping[str, PhaseWork]:
        """See `Algorithm`."""
        policy, _ = run.forward_flops()
        update = run.update_work()
        reference = 2 * run.config.data.batch_size * policy
        return {"update": PhaseWork(run.encode_flops() + reference + 2 * update.flops, run.slices + update.reads)}


ALGORITHM = Ldpo
