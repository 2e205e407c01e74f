"""Trains a reward model on preference pairs: minimises -log sigmoid(r_chosen - r_rejected)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from icet_jax.algorithms.state import OptimizerSettings, make_optimizer
from icet_jax.data.hh_rlhf import PreferencePair
from icet_jax.data.padding import bucket, pad_rows
from icet_jax.errors import UserError
from icet_jax.nn.gpt2 import GPT2RewardModel
from icet_jax.parallel.sharding import place_rows, row_slices, shardings
from icet_jax.scorers.pairs import HH_TEMPLATE, GPT2PairTokenizer
from icet_jax.scorers.reward_model import PairTokenizer
from icet_jax.scorers.rows import BatchedNetwork
from icet_jax.typing import Array, Bool, Float, Int

TokenPair = tuple[list[int], list[int]]
"""(token ids of prompt and chosen response, token ids of prompt and rejected response)."""


@dataclass(frozen=True)
class RewardTraining:
    """Holds the settings of `train_reward_model`, which uses AdamW.

    Attributes:
      steps: number of optimizer steps.
      batch_size: pairs per step.
      learning_rate: learning rate after the warm-up; it then falls to 0 along a cosine.
      warmup_steps: optimizer steps in which the learning rate rises from 0.
      weight_decay: weight decay.
      max_grad_norm: gradients are clipped to this global norm.
      seed: seed of the order of the pairs.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0


class RewardReport(NamedTuple):
    """Holds the results of training a reward model.

    Attributes:
      losses: mean loss of each step, in nats.
      held_out_accuracy: share of held-out pairs whose chosen response scores higher (a tie counts as wrong).
      held_out_margin: mean of r_chosen - r_rejected over the held-out pairs.
      held_out_pairs: number of held-out pairs.
    """

    losses: list[float]
    held_out_accuracy: float
    held_out_margin: float
    held_out_pairs: int


class RewardState(NamedTuple):
    """Holds everything that changes while a reward model is trained.

    Attributes:
      params: float32 weights.
      optimizer: optax's state for these weights.
      step: number of optimizer steps taken.
    """

    params: nnx.State
    optimizer: Any
    step: int


def preference_loss(chosen: Float[Array, "B"], rejected: Float[Array, "B"]) -> Float[Array, ""]:
    """Returns the mean of -log sigmoid(chosen - rejected) over B pairs, in nats (Bradley-Terry).

    Args:
      chosen: reward of the preferred response of each pair.
      rejected: reward of the other response.
    """
    return -jnp.mean(jax.nn.log_sigmoid(chosen - rejected))


class PairOrder:
    """Decides which pairs form a batch; batch n depends on (seed, n) alone, so a resumed run sees the same batches.

    Every epoch, that is every pass over the pairs, has its own random order. A window is a number of consecutive
    batches. Within a window, pairs of similar length are put into the same batch, which saves padding, and the batches
    are shuffled. A window of one batch leaves the order of the epoch as it is.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int, window: int = 1) -> None:
        """Stores the `lengths` of the pairs in tokens, and the number of batches per `window`."""
        self._lengths, self._batch_size, self._seed, self._window = np.asarray(lengths), batch_size, seed, window
        self._cached_window = -1
        self._cached_batches = np.zeros((0, 0), int)

    def batch(self, number: int) -> np.ndarray:
        """Returns the indices [batch_size] of the pairs in batch `number`, which counts from 0."""
        window, offset = divmod(number, self._window)
        if self._cached_window != window:
            self._cached_window, self._cached_batches = window, self._batches(window)
        return self._cached_batches[offset]

    def _batches(self, window: int) -> np.ndarray:
        """Returns the indices of the pairs in the batches of window `window` (from 0), [batches, batch_size]."""
        num_pairs, size = len(self._lengths), self._window * self._batch_size
        # Positions in the endless sequence of pairs: epoch 0, epoch 1, ...
        positions = range(window * size, (window + 1) * size)
        epochs = {position // num_pairs for position in positions}
        orders = {epoch: np.random.default_rng([self._seed, epoch]).permutation(num_pairs) for epoch in epochs}
        indices = np.array([orders[position // num_pairs][position % num_pairs] for position in positions])
        if self._window == 1:
            return indices[None]
        batches = indices[np.argsort(self._lengths[indices], kind="stable")].reshape(self._window, self._batch_size)
        return batches[np.random.default_rng([self._seed, 1, window]).permutation(self._window)]


class RewardTrainer:
    """Takes the optimizer steps of a training. What changes is in the `RewardState` that its methods take and return.

    Attributes:
      longest: largest number of tokens of a row.
      pairs: token ids of the pairs to learn from.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, pairs: Sequence[TokenPair], optimizer: optax.GradientTransformation, *,
        longest: int, batch_size: int, seed: int, accumulation: int = 1, window: int = 1, mesh: Mesh | None = None,
    ) -> None:  # fmt: skip
        """Stores the pairs and the optimizer; nothing is compiled yet.

        Args:
          graphdef: structure of a reward model, `GPT2RewardModel` or `LlamaRewardModel`.
          pairs: token ids of the pairs to learn from.
          optimizer: optimizer of the weights.
          longest: largest number of tokens of a row, and largest padded length.
          batch_size: pairs per step, a multiple of `accumulation`.
          seed: seed of the order of the pairs.
          accumulation: number of slices of a batch whose gradients are averaged.
          window: batches per window, see `PairOrder`.
          mesh: devices over which the weights are split; None for the default device.
        """
        self.pairs, self.longest = pairs, longest
        self._graphdef, self._optimizer, self._mesh, self._batch_size = graphdef, optimizer, mesh, batch_size
        lengths = [max(len(ids) for ids in pair) for pair in pairs]
        self._order = PairOrder(lengths, batch_size, seed=seed, window=window)
        self._step = _make_step(graphdef, optimizer, accumulation)
        self._jitted_step: Callable[..., Any] = jax.jit(self._step, donate_argnums=(0, 1))

    def start(self, params: nnx.State) -> RewardState:
        """Returns the state before the first step. `params` become part of it and are deleted by the first step."""
        optimizer = self._optimizer.init(params)
        if self._mesh is not None:
            placed = shardings((params, optimizer), self._mesh)
            optimizer = jax.device_put(optimizer, placed[1])
            # Otherwise the compiler may choose other shardings for the results, and the next step compiles again.
            self._jitted_step = jax.jit(self._step, donate_argnums=(0, 1), out_shardings=(*placed, None))
        return RewardState(params, optimizer, 0)

    def step(self, state: RewardState) -> tuple[RewardState, dict[str, float]]:
        """Takes one optimizer step on batch `state.step`; the arrays of `state` are deleted.

        Returns:
          The new state, and metrics of the batch under the weights before the step: `loss` (nats), `accuracy` (a tie
          counts as wrong), `margin` (mean of r_chosen - r_rejected), `reward` (mean over all responses), `grad_norm`
          (before clipping), `length` (positions of a row, including padding).

        Raises:
          UserError: the loss is not finite; the message names the step.
        """
        tokens, mask = self._rows(self._order.batch(state.step))
        rows = place_rows((tokens, mask), self._mesh)
        params, optimizer, scalars = self._jitted_step(state.params, state.optimizer, *rows)
        metrics = {name: float(value) for name, value in scalars.items()} | {"length": float(tokens.shape[-1])}
        if not np.isfinite(metrics["loss"]):
            loss = metrics["loss"]
            raise UserError(f"reward model: the loss is {loss} at step {state.step}; lower the learning rate")
        return RewardState(params, optimizer, state.step + 1), metrics

    def margins(self, params: nnx.State, pairs: Sequence[TokenPair]) -> np.ndarray:
        """Returns r_chosen - r_rejected of each pair, float32 [number of pairs], under the weights `params`.

        Raises:
          UserError: a score is not finite.
        """

        def score(params: nnx.State, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
            return nnx.merge(self._graphdef, params)(tokens, mask)

        network = BatchedNetwork(score, params, longest=self.longest, batch_size=self._batch_size, mesh=self._mesh)
        scores = network([ids for pair in pairs for ids in pair]).reshape(-1, 2)
        if not np.isfinite(scores).all():
            raise UserError(f"reward model: {int((~np.isfinite(scores)).sum())} held-out scores are not finite numbers")
        return scores[:, 0] - scores[:, 1]

    def _rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and mask [B, 2, T] of the pairs with these `indices`, padded to the same length.

        The second axis has the chosen response first, then the rejected one.
        """
        rows = [ids for index in indices for ids in self.pairs[index]]
        length = bucket(max(map(len, rows)), self.longest)
        tokens, mask = pad_rows(rows, length, len(rows))
        return tokens.reshape(-1, 2, length), mask.reshape(-1, 2, length)


def _make_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, accumulation: int
) -> Callable[..., Any]:
    """Returns the function of one optimizer step.

    It takes (params, optimizer state, tokens [B, 2, T], mask [B, 2, T]) and returns (params, optimizer state, {metric:
    scalar}).
    """

    def loss_of(params: nnx.State, tokens: Array, mask: Array) -> tuple[Array, Array]:
        model = nnx.merge(graphdef, params)
        length = tokens.shape[-1]
        rewards = model(tokens.reshape(-1, length), mask.reshape(-1, length)).reshape(-1, 2)
        return preference_loss(rewards[:, 0], rewards[:, 1]), rewards

    def step(
        params: nnx.State, state: Any, tokens: Int[Array, "B 2 T"], mask: Bool[Array, "B 2 T"]
    ) -> tuple[nnx.State, Any, dict[str, Array]]:
        def add(gradient_sum: nnx.State, rows: tuple[Array, Array]) -> tuple[nnx.State, tuple[Array, Array]]:
            (loss, rewards), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, *rows)
            return jax.tree.map(jnp.add, gradient_sum, gradients), (loss, rewards)

        zeros = jax.tree.map(jnp.zeros_like, params)
        gradient_sum, (losses, rewards) = jax.lax.scan(add, zeros, row_slices((tokens, mask), accumulation))
        gradients = jax.tree.map(lambda leaf: leaf / accumulation, gradient_sum)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        margins = rewards[..., 0] - rewards[..., 1]
        metrics = {
            "loss": losses.mean(),
            "accuracy": (margins > 0).mean(),
            "margin": margins.mean(),
            "reward": rewards.mean(),
            "grad_norm": optax.tree.norm(gradients),
        }
        return params, state, metrics

    return step


def train_reward_model(
    model: GPT2RewardModel,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    settings: RewardTraining,
    *,
    template: str = HH_TEMPLATE,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[GPT2RewardModel, RewardReport]:
    """Trains a copy of `model`, all weights of it, and tests the result on held-out pairs.

    Args:
      model: the model to start from; it is not changed.
      tokenizer: transformers' tokenizer of the model.
      pairs: training pairs, in a new random order each time all have been used.
      held_out: test pairs, whose prompts are not among the training pairs.
      settings: number of steps, batch size and optimizer settings.
      template: text around a prompt and its response, see `GPT2PairTokenizer`.
      progress: function that is called with (step, loss) after each step.

    Returns:
      The trained model, and its results.

    Raises:
      UserError: there are no pairs, or a loss is not finite; the message names the step.
    """
    if not pairs or not held_out:
        raise UserError(f"{len(pairs)} training and {len(held_out)} held-out preference pairs; both need at least one")
    longest = model.config.n_positions
    encode = GPT2PairTokenizer(tokenizer, template=template, max_length=longest)
    graphdef, params = nnx.split(model)
    trainer = RewardTrainer(
        graphdef, tokenise(encode, pairs), _optimizer(settings),
        longest=longest, batch_size=settings.batch_size, seed=settings.seed,
    )  # fmt: skip
    state = trainer.start(jax.tree.map(jnp.copy, params))
    losses = []
    for step in range(settings.steps):
        state, metrics = trainer.step(state)
        losses.append(metrics["loss"])
        if progress is not None:
            progress(step, losses[-1])
    margins = trainer.margins(state.params, tokenise(encode, held_out))
    report = RewardReport(losses, float(np.mean(margins > 0)), float(np.mean(margins)), len(held_out))
    return nnx.merge(graphdef, state.params), report


def tokenise(encode: PairTokenizer, pairs: Sequence[PreferencePair]) -> list[TokenPair]:
    """Returns the token ids of each pair, truncated to `encode.max_length` as when the model scores responses."""
    prompts, chosen, rejected = zip(*pairs, strict=True)
    return list(zip(encode(prompts, chosen), encode(prompts, rejected), strict=True))


def _optimizer(settings: RewardTraining) -> optax.GradientTransformation:
    """Returns AdamW with gradient clipping and the learning-rate schedule of `settings`."""
    return make_optimizer(
        OptimizerSettings(
            settings.learning_rate, schedule="cosine", warmup_steps=min(settings.warmup_steps, settings.steps - 1),
            total_steps=settings.steps, b1=0.9, b2=0.999, eps=1e-8, weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        )
    )  # fmt: skip
