"""The interface between an algorithm and the training loop, and what all algorithms have in common on the host.

An algorithm is one file of this package, which reads as a recipe, and one entry of `config.names.ALGORITHMS`. The host
does not wait for the device: it reads the metrics of an iteration only after it has started the next one.
"""

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx

from icet_jax.algorithms.metrics import host_metrics
from icet_jax.algorithms.phases import draw_exits
from icet_jax.algorithms.settings import Settings, from_config
from icet_jax.algorithms.state import TrainState
from icet_jax.algorithms.utilisation import Counter, Peak, Stopwatch, device_peak, speeds
from icet_jax.config import group_size
from icet_jax.config.names import ALGORITHMS
from icet_jax.errors import during
from icet_jax.parallel.distributed import fetch
from icet_jax.parallel.mesh_fit import slices
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import replicated, row_shards

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from icet_jax.algorithms.reward_by_kind import RewardByKind
    from icet_jax.evaluation.batching import PromptBatch
    from icet_jax.planning.ahead import AbstractRun
    from icet_jax.vlm import VLM

Metrics = dict[str, float]
"""{metric: value} of one iteration."""

ReadMetrics = Callable[[], Metrics]
"""Function that waits for an iteration to end and returns its metrics."""


@dataclasses.dataclass(frozen=True)
class PlannedPhase:
    """Describes one jitted program of a run, for `--mode=plan`.

    Attributes:
      name: name in the plan.
      inputs: abstract arrays of its row-aligned arguments; weights and train state are not among them.
      cache: abstract arrays of the KV cache that it works on, or None.
      lower: function that returns the program, ready for `.compile()`; it needs a mesh of devices.
      beside: abstract arrays that occupy the chips at the same time although the program does not take them: weights
        and train state of other phases.
      held: True if the program takes the cache as an argument and returns it; False if it creates the cache.
    """

    name: str
    inputs: Any
    cache: Any
    lower: Callable[[], Any]
    beside: Any = ()
    held: bool = False


class PhaseWork(NamedTuple):
    """Holds what a phase computes: operations of all chips together, and how often it reads the decoder's weights."""

    flops: int
    reads: int


class Algorithm(ABC):
    """Trains one model by one algorithm; base class of all algorithms.

    Attributes:
      value_head: whether it trains a value head (critic).
      bounded: whether `config.lppo.max_kl` limits the KL of its policy to the reference.
      paired: whether its rows are exit pairs (`data.pairs.ExitPair`).
      settings: settings for which its phases are compiled.
      iterations: number of iterations of the run.
      group_size: number of responses to each prompt in a batch.
      peak: peak speed of the devices, by which `perf/mfu` divides.
    """

    value_head: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    paired: ClassVar[bool] = False

    def __init__(self, config: "ConfigDict", vlm: "VLM", reward: "RewardByKind"):
        """Sets the attributes that all algorithms have; nothing is compiled yet.

        Args:
          config: checked config of the run.
          vlm: the model before training.
          reward: scores responses; only algorithms with rewards use it.
        """
        del reward
        self.iterations, self.group_size = config[config.algorithm].iterations, group_size(config)
        settings = from_config(config, vlm.sampling(config.lppo.max_new_tokens, config.lppo.temperature))
        shards = 1 if vlm.mesh is None else row_shards(vlm.mesh)
        self.settings: Settings = dataclasses.replace(settings, accumulation=slices(config, shards))
        self._vlm, self._run_key = vlm, jax.random.key(config.seed)
        self._exits = _exit_drawer(self.settings, vlm, config.data.batch_size // self.group_size)
        self._watch, self._counter = Stopwatch(), Counter(nnx.merge(vlm.graphdef, vlm.params), self.settings)
        devices = jax.devices()[:1] if vlm.mesh is None else list(vlm.mesh.devices.flat)
        self.peak: Peak = device_peak(devices, config.model.dtype)

    @abstractmethod
    def lowered(self, state: TrainState, batch: "PromptBatch") -> Iterator[tuple[str, Any]]:
        """Yields (name, program ready for `.compile()`) for each program of an iteration on a batch of these shapes."""

    @abstractmethod
    def begin(self, state: TrainState, batch: "PromptBatch") -> Any:
        """Starts an iteration on `batch`, up to the first step that needs the host, without waiting for the device.

        Returns:
          What `finish` needs.
        """

    @abstractmethod
    def finish(self, state: TrainState, batch: "PromptBatch", inputs: Any) -> tuple[TrainState, ReadMetrics]:
        """Runs the rest of an iteration, without waiting for its updates.

        Args:
          state: train state before the iteration; its buffers are donated.
          batch: the iteration's batch.
          inputs: result of `begin`.

        Returns:
          (train state after the iteration, function that waits for the iteration and returns its metrics).
        """

    def _start_rollout(self, rollout: Program, state: TrainState, batch: "PromptBatch") -> Any:
        """Draws the exits of a batch and starts `rollout` on the device; returns its result without waiting for it."""
        self._watch.start()
        with during("rollout"):
            exits = self._exits(self._run_key, state.iteration, state.controls.exits)
            return rollout(self._vlm.params, state, batch.images, batch.tokens, batch.mask, exits, self._run_key)

    def _learn_from_given(
        self, update: Program, state: TrainState, batch: "PromptBatch", inputs: Sequence[Any], lengths: np.ndarray,
        *, passes: int = 0,
    ) -> tuple[TrainState, ReadMetrics]:  # fmt: skip
        """Starts an iteration that learns from given answers, for `finish`.

        Args:
          update: the only phase, function of (params, state, *inputs) that donates the state.
          state: the train state.
          batch: rows of the iteration.
          inputs: the other arguments of `update`.
          lengths: number of tokens of each answer, int [B], or [B, k] for k answers to each prompt.
          passes: number of forward passes over every row in addition to those of the optimizer steps.
        """
        with during("update"):
            state, metrics = update(self._vlm.params, state, *inputs)
        prompts = fetch(batch.mask).sum(axis=1)
        operations = self._counter.count(prompts, lengths, images_per_row(batch), sampled=False, passes=passes)

        @during("update")
        def read() -> Metrics:
            row = host_metrics(metrics)
            return row | speeds(operations, {"update": self._watch.lap()}, self._counter.evaluated(row), self.peak)

        return state, read

    @classmethod
    @abstractmethod
    def planned(cls, run: "AbstractRun", get_program: Callable[[PlannedPhase], Any]) -> Iterator[PlannedPhase]:
        """Yields the phases of an iteration in their order, computed from shapes alone.

        Args:
          run: sizes of model, batch and train state.
          get_program: function that takes a phase yielded before and returns its compiled program, or None if it could
            not be compiled.
        """

    @classmethod
    @abstractmethod
    def work(cls, run: "AbstractRun") -> Mapping[str, PhaseWork]:
        """Returns {name of a planned phase: its work}, for answers of the largest allowed length."""


def algorithm_class(name: str) -> type[Algorithm]:
    """Returns the class of the algorithm with this name, whose module is imported at the first call."""
    return importlib.import_module(ALGORITHMS[name].module).ALGORITHM


def images_per_row(batch: "PromptBatch") -> np.ndarray:
    """Returns the number of images of each row, int [B]."""
    return np.array([len(example.images) for example in batch.examples])


def _exit_drawer(settings: Settings, vlm: "VLM", prompts: int) -> Program:
    """Returns the program that draws exits, a function of (run key, iteration, state of the schedule).

    Its result is int32 [prompts], complete on every device.
    """

    def draw(key: Any, iteration: Any, learned: Any) -> Any:
        return draw_exits(
            settings, key, iteration, learned, batch=prompts, num_exits=vlm.num_exits, default_exit=vlm.default_exit
        )

    everywhere = None if vlm.mesh is None else replicated(vlm.mesh)
    return Program(draw, cache_key=(settings, prompts, vlm.num_exits, vlm.default_exit), out_sharding=everywhere)
