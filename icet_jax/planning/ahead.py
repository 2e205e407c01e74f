"""The phases of a run as programs that are compiled ahead of time, from shapes alone."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from icet_jax import models as families
from icet_jax.algorithms import learner
from icet_jax.algorithms.settings import Settings, from_config
from icet_jax.algorithms.state import TrainState
from icet_jax.checkpoints.hf_import import Checkpoint, abstract_params
from icet_jax.checkpoints.published import config_values
from icet_jax.evaluation import queue
from icet_jax.generation import engine
from icet_jax.models.base.image_batches import batch_images
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import POLICY_ROOT, Images
from icet_jax.parallel.mesh_fit import slices
from icet_jax.parallel.sharding import ROWS, flatten_with_names, placed, replicated, row_shards, shardings
from icet_jax.runs.sources import checkpoint_directory
from icet_jax.training.loop import initial_state
from icet_jax.vlm import VLM


@dataclasses.dataclass(frozen=True)
class Phase:
    """One jitted program of a run.

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


class AbstractRun:
    """A run of `config` without weights or rows: every array is a shape, a dtype and a place on the mesh.

    Attributes:
      vlm: the model; its `params` are abstract, and lie on `mesh` instead of its own.
      settings: of L-PPO.
      state: the train state, abstract.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
        """Reads the sizes of `config.model.checkpoint`.

        Raises:
          UserError: they are not known here, or the model is not supported.
        """
        self.config, self.mesh = config, mesh
        self.vlm = _abstract_vlm(config, mesh)
        vlm = self.vlm
        settings = from_config(config, vlm.sampling(config.lppo.max_new_tokens, config.lppo.temperature))
        self.settings: Settings = dataclasses.replace(settings, accumulation=slices(config, row_shards(mesh)))

        def start(params: Any) -> TrainState:
            return initial_state(config, vlm.with_weights(params), self.settings)

        state = jax.eval_shape(start, vlm.params)
        self.state: TrainState = placed(state, shardings(state, mesh))

    @functools.cached_property
    def model(self) -> Any:
        """The network, abstract."""
        return nnx.merge(self.vlm.graphdef, self.vlm.params)

    def rows(self, tree: Any, batch: int) -> Any:
        """`tree` with the axis of its `batch` rows over the mesh, as `parallel.sharding.place_rows` puts it."""
        count = row_shards(self.mesh)

        def place(leaf: Any) -> Any:
            axis = next((number for number, size in enumerate(leaf.shape) if size % batch == 0), None)
            if axis is None or leaf.shape[axis] % count:
                where = replicated(self.mesh)
            else:
                where = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, ROWS))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree.map(place, tree)

    def images(self, batch: int) -> Images:
        """One image of the largest size in each of `batch` rows."""
        length = self.config.data.max_prompt_tokens
        one: Any = batch_images(self.vlm.config, {"input_ids": np.zeros((1, length), np.int32)}, num_rows=1, per_row=1)
        many = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), one)
        return self.rows(many.replace(num_rows=batch), batch)

    def prompts(self, batch: int) -> tuple[Any, Any]:
        """Tokens and mask, [B, P], at the longest prompt that the config allows."""
        shape = (batch, self.config.data.max_prompt_tokens)
        return self.rows((jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)), batch)

    def cache(self, batch: int, new_tokens: int) -> Any:
        """The KV cache of an answer, placed by the rules (the compiler may choose otherwise)."""

        def filled(params: Any, images: Images, tokens: Any, mask: Any) -> dict[str, Any]:
            model = _merge(self.vlm, params)
            visual = model.visual(model.encode(images), jnp.int32(1))
            return flatten_with_names(model.prefill(tokens, mask, visual)[1].with_room(new_tokens))

        cache = jax.eval_shape(filled, self.vlm.params, self.images(batch), *self.prompts(batch))
        return placed(cache, shardings(cache, self.mesh, "cache"))

    def phases(self, compiled: Callable[[Phase], Any]) -> Iterator[Phase]:
        """The phases in a run's order; `compiled` gives the program of one already yielded, None if there is none."""
        yield from self.sweep_phases(compiled)
        yield from self.training_phases(compiled)

    def _weights(self, *, policy: bool) -> dict[str, Any]:
        """Those of the decoder, or those of the image encoder and the projector."""
        named = flatten_with_names(self.vlm.params).items()
        return {name: leaf for name, leaf in named if name.startswith(f"{POLICY_ROOT}/") == policy}

    def sweep_phases(self, compiled: Callable[[Phase], Any]) -> Iterator[Phase]:
        """Those of a sweep's answers."""
        vlm, options, length = self.vlm, self.config.sweep, self.config.data.max_prompt_tokens
        slots, together = queue.group_sizes(options.batch_size, self.mesh)
        images = self.images(together)
        sampling = vlm.sampling(options.max_new_tokens, options.temperature, options.top_k, options.top_p)
        encode = Phase("sweep: encode", images, None, lambda: queue.encode.lower(vlm.graphdef, vlm.params, images),
                       [self._weights(policy=True), self.state])  # fmt: skip
        yield encode
        encoded = self._outputs(
            encode, compiled, together, lambda *a: _merge(vlm, a[0]).encode(a[1]), vlm.params, images
        )
        lora, state = None, self.state
        if self.settings.lora_scale is not None:
            state = state.opt_state
            lora = Lora(weights=self.state.trainable["policy"], scale=self.settings.lora_scale)
        numbers = jax.ShapeDtypeStruct((together,), jnp.int32)
        tokens, mask = (jax.ShapeDtypeStruct((together, length), dtype) for dtype in (jnp.int32, jnp.bool_))
        keys = jax.ShapeDtypeStruct((together, *jax.random.key_data(jax.random.key(0)).shape), jnp.uint32)
        prompts = engine.Prompts(tokens, mask, numbers, numbers, keys, numbers)
        machine = engine.Engine(
            vlm.graphdef, vlm.params, sampling,
            slots=slots, columns=length + options.max_new_tokens, lora=lora, mesh=self.mesh,
        )  # fmt: skip
        rows = machine.shapes(engine.Work([], prompts, encoded))
        static = vlm.graphdef, sampling, self.mesh
        yield Phase(
            "sweep: fill", (encoded, prompts), rows.cache,
            lambda: engine.fill.lower(*static, vlm.params, lora, rows, numbers, prompts, encoded, None),
            state, held=True,
        )  # fmt: skip
        yield Phase(
            "sweep: decode", machine.apart_shapes(), rows.cache,
            lambda: engine.decode.lower(*static, vlm.params, machine.apart_shapes(), rows),
            [self._weights(policy=False), state], held=True,
        )  # fmt: skip

    def training_phases(self, compiled: Callable[[Phase], Any]) -> Iterator[Phase]:
        """Those of an L-PPO iteration."""
        vlm, config, state = self.vlm, self.config, self.state
        batch = config.data.batch_size
        learner.check_divides(self.settings, batch)
        mesh = self.mesh if isinstance(self.mesh, Mesh) else None
        phases: Any = learner.build(vlm.graphdef, self.settings, mesh)
        images, (tokens, mask) = self.images(batch), self.prompts(batch)
        exits = self.rows(jax.ShapeDtypeStruct((batch,), jnp.int32), batch)
        key = _keys()
        # Under full fine-tuning the policy has weights of its own, and only `prepare` takes the reference.
        reference = () if self.settings.lora_scale is not None else self._weights(policy=True)
        arguments = (vlm.params, state, images, tokens, mask, exits, key)
        rollout = Phase(
            "rollout", (images, tokens, mask), self.cache(batch, config.lppo.max_new_tokens),
            lambda: phases.rollout.jitted.lower(*arguments), [reference, state.opt_state],
        )  # fmt: skip
        yield rollout
        made = self._outputs(rollout, compiled, batch, phases.rollout, *arguments)
        per_row = (np.zeros(batch, np.float32), np.zeros(batch, bool), np.ones(batch, bool))
        given = (vlm.params, state.trainable, state.controls, made, *per_row)
        encoder = self._weights(policy=False)
        prepare = Phase(
            "prepare", made, None, lambda: phases.prepare_arrays.jitted.lower(*given), [encoder, state.opt_state]
        )  # fmt: skip
        yield prepare
        train_batch = self._outputs(prepare, compiled, batch, phases.prepare_arrays, *given, first=True)
        yield Phase(
            "update", train_batch, None,
            lambda: phases.update.jitted.lower(vlm.params, state, train_batch, key),
            [encoder, reference],
        )  # fmt: skip

    def _outputs(
        self, phase: Phase, compiled: Callable[[Phase], Any], batch: int, function: Any, *arguments: Any,
        first: bool = False,
    ) -> Any:  # fmt: skip
        """What a phase returns (the first part of it): placed by the compiler, or over rows where there is none."""
        program = compiled(phase)
        found = jax.eval_shape(function, *arguments) if program is None else learner.outputs(program)
        found = found[0] if first else found
        return self.rows(found, batch) if program is None else found


def _abstract_vlm(config: ConfigDict, mesh: Mesh | AbstractMesh) -> VLM:
    model = config.model
    spec = checkpoint_directory(model.checkpoint)
    values = config_values(spec)
    where = f"{spec}: config.json"
    sizes = families.vlm_config(values, where, exit_rule=model.exit_rule, capture=model.intermediate_capture)
    make = functools.partial(families.family_of(sizes).network, sizes, remat=model.remat)
    graphdef, params = abstract_params(make, model.dtype, model.dtype)
    params = placed(params, shardings(params, mesh))
    return VLM(Checkpoint(graphdef, params, sizes, values, Path(spec)))


def _merge(vlm: VLM, params: Any) -> Any:
    return nnx.merge(vlm.graphdef, params)


def _keys(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jax.random.key(0).dtype)


def bytes_per_device(tree: Any) -> int:
    """Bytes that each device holds of abstract arrays, by their shardings; one without is on every device."""

    def size(leaf: Any) -> int:
        shape = leaf.shape
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            shape = leaf.sharding.shard_shape(leaf.shape)
        itemsize = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return int(np.prod(shape)) * itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
