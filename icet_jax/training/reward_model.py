"""Training a reward model on preference pairs: minimise -log sigmoid(r_chosen - r_rejected)."""

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
from icet_jax.data.padding import bucket, pad_rows
from icet_jax.errors import UserError
from icet_jax.nn.gpt2 import GPT2RewardModel
from icet_jax.parallel.sharding import place_rows, row_slices, shardings
from icet_jax.scorers.pairs import HH_TEMPLATE, GPT2PairTokenizer
from icet_jax.scorers.rows import BatchedNetwork
from icet_jax.typing import Array, Bool, Float, Int

PreferencePair = tuple[str, str, str]
"""(prompt, chosen response, rejected response)."""
TokenPair = tuple[list[int], list[int]]
"""Token ids of (prompt, chosen response) and of (prompt, rejected response)."""


@dataclass(frozen=True)
class RewardTraining:
    """Settings of `train_reward_model`.

    Attributes:
      steps: optimizer steps.
      batch_size: pairs per step.
      learning_rate: peak of AdamW's, after the warm-up; it then falls to 0 along a cosine.
      warmup_steps: optimizer steps from 0 to the peak.
      weight_decay: AdamW's.
      max_grad_norm: gradients are clipped to this global norm.
      seed: of the order of the pairs.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0


class RewardReport(NamedTuple):
    """What training reached.

    Attributes:
      losses: mean loss of each step, in nats.
      held_out_accuracy: share of held-out pairs whose chosen response scores higher (a tie counts as wrong).
      held_out_margin: mean of r_chosen - r_rejected over the held-out pairs.
      held_out_pairs: how many there were.
    """

    losses: list[float]
    held_out_accuracy: float
    held_out_margin: float
    held_out_pairs: int


class RewardState(NamedTuple):
    """What changes while a reward model is trained.

    Attributes:
      params: float32 weights.
      optimizer: optax's state over them.
      step: optimizer steps taken.
    """

    params: nnx.State
    optimizer: Any
    step: int


def preference_loss(chosen: Float[Array, "B"], rejected: Float[Array, "B"]) -> Float[Array, ""]:
    """Mean of -log sigmoid(r_w - r_l) over B pairs, in nats (Bradley-Terry)."""
    return -jnp.mean(jax.nn.log_sigmoid(chosen - rejected))


class PairOrder:
    """Which pairs make batch n: a pure function of (seed, n), whatever was drawn before.

    Every pass over the pairs has its own random order. Within windows of `window` batches, pairs of similar length
    are put together, which saves padding, and the batches of a window come in random order; 1 leaves the order as
    drawn.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int, window: int = 1) -> None:
        """`lengths`: of each pair, in tokens."""
        self._lengths, self._size, self._seed, self._window = np.asarray(lengths), batch_size, seed, window
        self._cached: tuple[int, np.ndarray] = -1, np.zeros((0, 0), int)

    def batch(self, number: int) -> np.ndarray:
        """Indices [batch_size] of the pairs of batch `number`, from 0."""
        window, offset = divmod(number, self._window)
        if self._cached[0] != window:
            self._cached = window, self._draw(window)
        return self._cached[1][offset]

    def _draw(self, window: int) -> np.ndarray:
        """Batches [window, batch_size] of one window."""
        count, size = len(self._lengths), self._window * self._size
        places = range(window * size, (window + 1) * size)
        numbers = {place // count for place in places}
        laps = {lap: np.random.default_rng([self._seed, lap]).permutation(count) for lap in numbers}
        chosen = np.array([laps[place // count][place % count] for place in places])
        if self._window == 1:
            return chosen[None]
        batches = chosen[np.argsort(self._lengths[chosen], kind="stable")].reshape(self._window, self._size)
        return batches[np.random.default_rng([self._seed, 1, window]).permutation(self._window)]


class RewardTrainer:
    """The steps of one training; nothing in it changes but caches and compiled functions.

    Attributes:
      longest: most tokens of a row.
      pairs: what is learned from.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, pairs: Sequence[TokenPair], optimizer: optax.GradientTransformation, *,
        longest: int, batch_size: int, seed: int, accumulation: int = 1, window: int = 1, mesh: Mesh | None = None,
    ) -> None:  # fmt: skip
        """Nothing is compiled yet.

        Args:
          graphdef: of a `GPT2RewardModel`.
          pairs: tokens to learn from.
          optimizer: over the weights.
          longest: most tokens of a row, the largest padded length.
          batch_size: pairs per step, a multiple of `accumulation`.
          seed: of the order of the pairs.
          accumulation: slices of a batch whose gradients are averaged.
          window: see `PairOrder`.
          mesh: that of the weights; None for the default device.
        """
        self.pairs, self.longest = pairs, longest
        self._graphdef, self._optimizer, self._mesh, self._size = graphdef, optimizer, mesh, batch_size
        lengths = [max(len(ids) for ids in pair) for pair in pairs]
        self._order = PairOrder(lengths, batch_size, seed=seed, window=window)
        self._step = _make_step(graphdef, optimizer, accumulation)
        self._compiled: Callable[..., Any] = jax.jit(self._step, donate_argnums=(0, 1))

    def start(self, params: nnx.State) -> RewardState:
        """The state before the first step; the state owns `params`, whose buffers the steps reuse."""
        optimizer = self._optimizer.init(params)
        if self._mesh is not None:
            placed = shardings((params, optimizer), self._mesh)
            optimizer = jax.device_put(optimizer, placed[1])
            # Left to itself the compiler returns other shardings, and the next step compiles again for them.
            self._compiled = jax.jit(self._step, donate_argnums=(0, 1), out_shardings=(*placed, None))
        return RewardState(params, optimizer, 0)

    def step(self, state: RewardState) -> tuple[RewardState, dict[str, float]]:
        """One optimizer step on batch `state.step`; the old state's arrays are gone afterwards.

        Returns:
          The new state, and numbers of the batch before the step: `loss` (nats), `accuracy` (a tie counts as wrong),
          `margin` (mean r_chosen - r_rejected), `reward` (mean of all), `grad_norm` (before clipping), `length`
          (positions of a row, padding included).

        Raises:
          UserError: the loss is not finite (names the step).
        """
        tokens, mask = self._rows(self._order.batch(state.step))
        rows = place_rows((tokens, mask), self._mesh)
        params, optimizer, numbers = self._compiled(state.params, state.optimizer, *rows)
        found = {name: float(value) for name, value in numbers.items()} | {"length": float(tokens.shape[-1])}
        if not np.isfinite(found["loss"]):
            raise UserError(f"reward model: the loss is {found['loss']} at step {state.step}; lower the learning rate")
        return RewardState(params, optimizer, state.step + 1), found

    def margins(self, params: nnx.State, pairs: Sequence[TokenPair]) -> np.ndarray:
        """r_chosen - r_rejected, float32 [N], of other pairs.

        Raises:
          UserError: a score is not finite.
        """

        def score(params: nnx.State, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
            return nnx.merge(self._graphdef, params)(tokens, mask)

        network = BatchedNetwork(score, params, longest=self.longest, batch_size=self._size, mesh=self._mesh)
        scores = network([ids for pair in pairs for ids in pair]).reshape(-1, 2)
        if not np.isfinite(scores).all():
            raise UserError(f"reward model: {int((~np.isfinite(scores)).sum())} held-out scores are not finite numbers")
        return scores[:, 0] - scores[:, 1]

    def _rows(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask [B, 2, T] of the pairs `chosen`, padded to one bucket."""
        rows = [ids for index in chosen for ids in self.pairs[index]]
        length = bucket(max(map(len, rows)), self.longest)
        tokens, mask = pad_rows(rows, length, len(rows))
        return tokens.reshape(-1, 2, length), mask.reshape(-1, 2, length)


def _make_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, accumulation: int
) -> Callable[..., Any]:
    """(params, optimizer state, tokens [B, 2, T], mask) -> (params, optimizer state, numbers)."""

    def loss_of(params: nnx.State, tokens: Array, mask: Array) -> tuple[Array, Array]:
        model = nnx.merge(graphdef, params)
        length = tokens.shape[-1]
        rewards = model(tokens.reshape(-1, length), mask.reshape(-1, length)).reshape(-1, 2)
        return preference_loss(rewards[:, 0], rewards[:, 1]), rewards

    def step(
        params: nnx.State, state: Any, tokens: Int[Array, "B 2 T"], mask: Bool[Array, "B 2 T"]
    ) -> tuple[nnx.State, Any, dict[str, Array]]:
        def add(total: nnx.State, part: tuple[Array, Array]) -> tuple[nnx.State, tuple[Array, Array]]:
            (loss, rewards), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, *part)
            return jax.tree.map(jnp.add, total, gradients), (loss, rewards)

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, (losses, rewards) = jax.lax.scan(add, zeros, row_slices((tokens, mask), accumulation))
        gradients = jax.tree.map(lambda leaf: leaf / accumulation, total)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        margins = rewards[..., 0] - rewards[..., 1]
        numbers = {
            "loss": losses.mean(),
            "accuracy": (margins > 0).mean(),
            "margin": margins.mean(),
            "reward": rewards.mean(),
            "grad_norm": optax.tree.norm(gradients),
        }
        return params, state, numbers

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
    """Trains every weight of `model`, which is left as it was, and tests the result on pairs it has not seen.

    Args:
      model: starting point.
      tokenizer: transformers'.
      pairs: training pairs; drawn in a new seeded order each time all have been used.
      held_out: pairs of other prompts.
      settings: sizes and optimizer.
      template: see `GPT2PairTokenizer`.
      progress: called after each step with (step, loss).

    Returns:
      (trained model, report).

    Raises:
      UserError: no pairs, or a loss that is not finite (names the step).
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
    for number in range(settings.steps):
        state, numbers = trainer.step(state)
        losses.append(numbers["loss"])
        if progress is not None:
            progress(number, losses[-1])
    margins = trainer.margins(state.params, tokenise(encode, held_out))
    report = RewardReport(losses, float(np.mean(margins > 0)), float(np.mean(margins)), len(held_out))
    return nnx.merge(graphdef, state.params), report


def tokenise(encode: GPT2PairTokenizer, pairs: Sequence[PreferencePair]) -> list[TokenPair]:
    """Token ids of each pair, cut to `encode.max_length` as at scoring time."""
    prompts, chosen, rejected = zip(*pairs, strict=True)
    return list(zip(encode(prompts, chosen), encode(prompts, rejected), strict=True))


def _optimizer(settings: RewardTraining) -> optax.GradientTransformation:
    return make_optimizer(
        OptimizerSettings(
            settings.learning_rate, schedule="cosine", warmup_steps=min(settings.warmup_steps, settings.steps - 1),
            total_steps=settings.steps, b1=0.9, b2=0.999, eps=1e-8, weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        )
    )  # fmt: skip
