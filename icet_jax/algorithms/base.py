"""What every algorithm gives the training loop, and what they have in common on the host.

An algorithm is one file of this package, which reads as a recipe, and one line of `config.names.ALGORITHMS`. What is
dispatched runs while the host goes on: an iteration's metrics are read after the next one has begun.
"""

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx

from icet_jax.algorithms.phases import draw_exits
from icet_jax.algorithms.settings import Settings, from_config
from icet_jax.algorithms.state import TrainState
from icet_jax.algorithms.utilisation import Counter, Peak, Stopwatch, device_peak
from icet_jax.config import group_size
from icet_jax.config.names import ALGORITHMS
from icet_jax.parallel.mesh_fit import slices
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import replicated, row_shards

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from icet_jax.algorithms.reward_by_kind import RewardByKind
    from icet_jax.evaluation.batching import PromptBatch
    from icet_jax.planning.ahead import AbstractRun
    from icet_jax.vlm import VLM

Row = dict[str, float]
Read = Callable[[], Row]
"""Waits for an iteration to end and gives its metrics."""


@dataclasses.dataclass(frozen=True)
class PlannedPhase:
    """One jitted program of a run, for `--mode=plan`.

    Attributes:
      name: of its line in the plan.
      inputs: what it takes beside weights and train state, abstractly; row-aligned.
      cache: the KV cache that it works on, abstractly, or None.
      lower: gives what `.compile()` compiles; it needs a mesh of devices.
      beside: what lies on the chips meanwhile without being taken: weights and train state that others use.
      held: the cache is not made by the phase, but taken and given back.
    """

    name: str
    inputs: Any
    cache: Any
    lower: Callable[[], Any]
    beside: Any = ()
    held: bool = False


class PhaseWork(NamedTuple):
    """What a phase computes: operations of all chips together, and how often it reads the decoder's weights."""

    flops: int
    reads: int


class Algorithm(ABC):
    """One algorithm on one model.

    Attributes:
      value_head: whether it trains a critic.
      bounded: whether `config.lppo.max_kl` bounds how far it goes from the reference.
      paired: whether its rows are exit pairs (`data.pairs.ExitPair`).
      settings: what its phases are compiled for.
      iterations: length of the run.
      group_size: responses of each prompt in a batch.
      peak: of the devices, which `perf/mfu` relates to.
    """

    value_head: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    paired: ClassVar[bool] = False

    def __init__(self, config: "ConfigDict", vlm: "VLM", reward: "RewardByKind"):
        """Prepares what all algorithms have; nothing is compiled.

        Args:
          config: checked.
          vlm: the model before training.
          reward: scores responses, for those that are rewarded.
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
        """Everything that an iteration runs on the device, by name, ready to be compiled for batches of this shape."""

    @abstractmethod
    def begin(self, state: TrainState, batch: "PromptBatch") -> Any:
        """Starts an iteration on `batch` as far as it needs nothing from the host, and waits for nothing."""

    @abstractmethod
    def finish(self, state: TrainState, batch: "PromptBatch", begun: Any) -> tuple[TrainState, Read]:
        """The rest of the iteration that `begin` gave `begun` for; donates `state`, waits for no update."""

    @classmethod
    @abstractmethod
    def planned(cls, run: "AbstractRun", compiled: Callable[[PlannedPhase], Any]) -> Iterator[PlannedPhase]:
        """The phases of an iteration in their order, from shapes alone.

        Args:
          run: sizes of model, batch and train state.
          compiled: gives the program of a phase already yielded, None if there is none.
        """

    @classmethod
    @abstractmethod
    def work(cls, run: "AbstractRun") -> Mapping[str, PhaseWork]:
        """What each of the planned phases computes, by its name, every answer as long as allowed."""


def algorithm_class(name: str) -> type[Algorithm]:
    """The algorithm of that name, imported on first use; `ALGORITHMS` holds what can be said of it without jax."""
    return importlib.import_module(ALGORITHMS[name].module).ALGORITHM


def images_per_row(batch: "PromptBatch") -> np.ndarray:
    """Images of each row, int [B]."""
    return np.array([len(example.images) for example in batch.examples])


def _exit_drawer(settings: Settings, vlm: "VLM", prompts: int) -> Program:
    """(run key, iteration, what the schedule has learnt) -> exits int32 [prompts], on every device."""

    def draw(key: Any, iteration: Any, learned: Any) -> Any:
        return draw_exits(
            settings, key, iteration, learned, batch=prompts, num_exits=vlm.num_exits, default_exit=vlm.default_exit
        )

    everywhere = None if vlm.mesh is None else replicated(vlm.mesh)
    return Program(draw, about=(settings, prompts, vlm.num_exits, vlm.default_exit), out_sharding=everywhere)
