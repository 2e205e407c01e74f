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
from icet_jax.algorithms import phases
from icet_jax.algorithms.base import Algorithm, PhaseWork, PlannedPhase, algorithm_class
from icet_jax.algorithms.settings import Settings, from_config
from icet_jax.algorithms.state import TrainState
from icet_jax.checkpoints.hf_import import Checkpoint, abstract_params
from icet_jax.checkpoints.published import config_values
from icet_jax.evaluation import queue
from icet_jax.generation import engine
from icet_jax.models.base.image_batches import batch_images
from icet_jax.nn import flops
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import POLICY_ROOT, Images
from icet_jax.parallel.mesh_fit import slices
from icet_jax.parallel.sharding import ROWS, flatten_with_names, placed, replicated, row_shards, shardings
from icet_jax.runs.sources import checkpoint_directory
from icet_jax.training.loop import initial_state
from icet_jax.vlm import VLM


class AbstractRun:
    """A run of `config` without weights or rows: every array is a shape, a dtype and a place on the mesh.

    Attributes:
      vlm: the model; its `params` are abstract, and lie on `mesh` instead of its own.
      algorithm: which the config names.
      devices: the mesh, where its devices can be compiled for; else None.
      settings: of the algorithm.
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
        self.algorithm: type[Algorithm] = algorithm_class(config.algorithm)
        self.devices = mesh if isinstance(mesh, Mesh) else None
        self.key = _keys()
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

    def exits(self, batch: int) -> Any:
        """The exit of each row."""
        return self.rows(jax.ShapeDtypeStruct((batch,), jnp.int32), batch)

    @property
    def slices(self) -> int:
        """Slices of a batch: what one pass takes at once is one of them."""
        return self.settings.minibatches * self.settings.accumulation

    def cache(self, batch: int, new_tokens: int) -> Any:
        """The KV cache of an answer, placed by the rules (the compiler may choose otherwise)."""

        def filled(params: Any, images: Images, tokens: Any, mask: Any) -> dict[str, Any]:
            model = _merge(self.vlm, params)
            visual = model.visual(model.encode(images), jnp.int32(1))
            return flatten_with_names(model.prefill(tokens, mask, visual)[1].with_room(new_tokens))

        cache = jax.eval_shape(filled, self.vlm.params, self.images(batch), *self.prompts(batch))
        return placed(cache, shardings(cache, self.mesh, "cache"))

    def phases(self, compiled: Callable[[PlannedPhase], Any]) -> Iterator[PlannedPhase]:
        """The phases in a run's order; `compiled` gives the program of one already yielded, None if there is none."""
        yield from self.sweep_phases(compiled)
        yield from self.training_phases(compiled)

    def weights(self, *, policy: bool) -> dict[str, Any]:
        """Those of the decoder, or those of the image encoder and the projector."""
        named = flatten_with_names(self.vlm.params).items()
        return {name: leaf for name, leaf in named if name.startswith(f"{POLICY_ROOT}/") == policy}

    def sweep_phases(self, compiled: Callable[[PlannedPhase], Any]) -> Iterator[PlannedPhase]:
        """Those of a sweep's answers."""
        vlm, options, length = self.vlm, self.config.sweep, self.config.data.max_prompt_tokens
        slots, together = queue.group_sizes(options.batch_size, self.mesh)
        images = self.images(together)
        sampling = vlm.sampling(options.max_new_tokens, options.temperature, options.top_k, options.top_p)
        encode = PlannedPhase(
            "sweep: encode", images, None, lambda: queue.encode.lower(vlm.graphdef, vlm.params, images),
            [self.weights(policy=True), self.state],
        )  # fmt: skip
        yield encode
        encoded = self.outputs(
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
        rows = machine.shapes(engine.PromptGroup([], prompts, encoded))
        static = vlm.graphdef, sampling, self.mesh
        yield PlannedPhase(
            "sweep: fill", (encoded, prompts), rows.cache,
            lambda: engine.fill.lower(*static, vlm.params, lora, rows, numbers, prompts, encoded, None),
            state, held=True,
        )  # fmt: skip
        yield PlannedPhase(
            "sweep: decode", machine.unstacked_shapes(), rows.cache,
            lambda: engine.decode.lower(*static, vlm.params, machine.unstacked_shapes(), rows),
            [self.weights(policy=False), state], held=True,
        )  # fmt: skip

    def training_phases(self, compiled: Callable[[PlannedPhase], Any]) -> Iterator[PlannedPhase]:
        """Those of an iteration of the run's algorithm."""
        return self.algorithm.planned(self, compiled)

    def outputs(
        self, phase: PlannedPhase, compiled: Callable[[PlannedPhase], Any], batch: int, function: Any, *arguments: Any,
        first: bool = False,
    ) -> Any:  # fmt: skip
        """What a phase returns (the first part of it): placed by the compiler, or over rows where there is none."""
        program = compiled(phase)
        found = jax.eval_shape(function, *arguments) if program is None else phases.outputs(program)
        found = found[0] if first else found
        return self.rows(found, batch) if program is None else found

    def forward_flops(self) -> tuple[int, int]:
        """One teacher-forced pass over a row's prompt and response: the model's operations, and the adapters'."""
        taught = self.settings.sampling.max_new_tokens
        length = self.config.data.max_prompt_tokens + taught - 1
        head = flops.logits(self.vlm.hidden_size, self.vlm.vocab_size)
        one = self.model.operations(length, length, 1)
        rank, targets = self.config.lora.rank, self.config.lora.targets
        adapted = [shape for name, shape in self.vlm.lora_shapes.items() if name.rpartition("/")[2] in targets]
        return one.forward + taught * head, length * flops.adapters(adapted, rank)

    def encode_flops(self) -> int:
        """The images of a batch through the tower, and one exit of each through the projector."""
        length = self.config.data.max_prompt_tokens
        one = self.model.operations(length, length, 1)
        return self.config.data.batch_size * (one.encode + one.visual)

    def rollout_work(self) -> PhaseWork:
        """A batch's answers, each token after the other."""
        length, taught = self.config.data.max_prompt_tokens, self.settings.sampling.max_new_tokens
        sampled = self.model.operations(length, length + taught, 1)
        batch = self.config.data.batch_size
        flops = sampled.encode + sampled.visual + sampled.prefill + (taught - 1) * sampled.step
        return PhaseWork(batch * flops, taught)

    def update_work(self) -> PhaseWork:
        """An iteration's epochs over a batch, with what `config.model.remat` computes again."""
        policy, adapters = self.forward_flops()
        again = int(self.config.model.remat == "full")  # the forward pass, once more while going back
        weights_too = int(self.settings.lora_scale is None)
        epochs, batch = self.settings.epochs, self.config.data.batch_size
        flops = epochs * batch * ((2 + weights_too + again) * policy + (3 + again) * adapters)
        return PhaseWork(flops, epochs * self.slices * (2 + again))


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
