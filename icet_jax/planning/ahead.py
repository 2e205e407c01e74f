"""Describes a run as shapes, and its phases as programs that can be compiled for chips that are not present.

In this module an array is *abstract* if it is a `jax.ShapeDtypeStruct`: shape, dtype and sharding without values.
"""

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
from icet_jax.algorithms.forward import replaced_roots
from icet_jax.algorithms.settings import Settings, from_config
from icet_jax.algorithms.state import TrainState
from icet_jax.checkpoints.hf_import import Checkpoint, abstract_params
from icet_jax.checkpoints.published import config_values
from icet_jax.config import group_size
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

GetProgram = Callable[[PlannedPhase], Any]
"""Function that takes a phase yielded before and returns its compiled program (`jax.stages.Compiled`), or None if that
phase was not compiled."""


class AbstractRun:
    """Describes a run of `config` by abstract arrays.

    Attributes:
      config: config of the run.
      mesh: the chips.
      vlm: the model with abstract weights, which are split over `mesh`.
      algorithm: class of the algorithm that the config names.
      group_size: responses of each prompt in a training batch.
      devices: the mesh if programs can be compiled for its chips, else None.
      key: an abstract random key.
      settings: settings of the algorithm.
      state: the abstract train state.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
        """Reads the sizes of `config.model.checkpoint`, but no weights.

        Raises:
          UserError: the sizes are unknown, because the checkpoint is neither on this machine nor in
            `icet_jax.checkpoints.published`; or the model is not supported.
        """
        self.config, self.mesh = config, mesh
        self.vlm = _abstract_vlm(config, mesh)
        vlm = self.vlm
        self.algorithm: type[Algorithm] = algorithm_class(config.algorithm)
        self.group_size = group_size(config)
        self.devices = mesh if isinstance(mesh, Mesh) else None
        self.key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
        settings = from_config(config, vlm.sampling(config.lppo.max_new_tokens, config.lppo.temperature))
        self.settings: Settings = dataclasses.replace(settings, accumulation=slices(config, row_shards(mesh)))

        def start(params: Any) -> TrainState:
            return initial_state(config, vlm.with_weights(params), self.settings)

        state = jax.eval_shape(start, vlm.params)
        self.state: TrainState = placed(state, shardings(state, mesh))

    @functools.cached_property
    def model(self) -> Any:
        """The network with abstract weights."""
        return nnx.merge(self.vlm.graphdef, self.vlm.params)

    def rows(self, tree: Any, batch: int) -> Any:
        """Returns `tree` with each leaf's rows split over the mesh, as `parallel.sharding.place_rows` splits them.

        Args:
          tree: abstract arrays.
          batch: number of rows. The first axis of a leaf whose length is a multiple of `batch` counts as the axis of
            rows; a leaf without such an axis is replicated on every chip.
        """
        shards = row_shards(self.mesh)

        def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axis = next((number for number, size in enumerate(leaf.shape) if size % batch == 0), None)
            if axis is None or leaf.shape[axis] % shards:
                sharding = replicated(self.mesh)
            else:
                sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, ROWS))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(place, tree)

    def images(self, batch: int) -> Images:
        """Returns abstract images of `batch` rows, with one image of the largest size in each row."""
        length = self.config.data.max_prompt_tokens
        one_row: Any = batch_images(
            self.vlm.config, {"input_ids": np.zeros((1, length), np.int32)}, num_rows=1, per_row=1
        )
        many = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), one_row)
        return self.rows(many.replace(num_rows=batch), batch)

    def prompts(self, batch: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Returns abstract tokens (int32) and mask (bool) of `batch` prompts, both [batch, longest allowed prompt]."""
        shape = (batch, self.config.data.max_prompt_tokens)
        return self.rows((jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)), batch)

    def exits(self, batch: int) -> jax.ShapeDtypeStruct:
        """Returns the abstract exits of `batch` rows, int32 [batch]."""
        return self.rows(jax.ShapeDtypeStruct((batch,), jnp.int32), batch)

    @property
    def slices(self) -> int:
        """The number of slices into which the update divides a batch: mini-batches times accumulation."""
        return self.settings.minibatches * self.settings.accumulation

    def cache(self, batch: int, new_tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns {array name: abstract array} of the KV cache of `batch` prompts of the largest length.

        It has space for `new_tokens` more tokens of each prompt. The arrays have the shardings of the sharding rules;
        the compiler may choose others.
        """

        def fill_cache(params: Any, images: Images, tokens: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
            model = _merge(self.vlm, params)
            visual = model.visual(model.encode(images), jnp.int32(1))
            return flatten_with_names(model.prefill(tokens, mask, visual)[1].with_room(new_tokens))

        cache = jax.eval_shape(fill_cache, self.vlm.params, self.images(batch), *self.prompts(batch))
        return placed(cache, shardings(cache, self.mesh, "cache"))

    def phases(self, get_program: GetProgram) -> Iterator[PlannedPhase]:
        """Yields the phases of a sweep, then those of a training iteration, in the order in which they run."""
        yield from self.sweep_phases(get_program)
        yield from self.training_phases(get_program)

    def weights(self, *, policy: bool) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns {name: abstract weight} of the decoder if `policy`, else of all other parts of the model."""
        leaves = flatten_with_names(self.vlm.params).items()
        return {name: leaf for name, leaf in leaves if name.startswith(f"{POLICY_ROOT}/") == policy}

    def replaced_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns {name: abstract weight} of the weights that an update does not use, because trained ones replace
        them; they stay for the reference."""
        roots = tuple(f"{root}/" for root in replaced_roots(self.settings.trained, self.settings.lora_scale).values())
        return {name: leaf for name, leaf in flatten_with_names(self.vlm.params).items() if name.startswith(roots)}

    def sweep_phases(self, get_program: GetProgram) -> Iterator[PlannedPhase]:
        """Yields the phases that generate a sweep's answers: encode images, fill the KV cache, decode."""
        vlm, options, length = self.vlm, self.config.sweep, self.config.data.max_prompt_tokens
        slots, group_rows = queue.group_sizes(options.batch_size, self.mesh)
        images = self.images(group_rows)
        sampling = vlm.sampling(options.max_new_tokens, options.temperature, options.top_k, options.top_p)
        encode = PlannedPhase(
            "sweep: encode", images, None, lambda: queue.encode.lower(vlm.graphdef, vlm.params, images),
            [self.weights(policy=True), self.state],
        )  # fmt: skip
        yield encode
        encoded = self.outputs(
            encode,
            get_program,
            group_rows,
            lambda params, images: _merge(vlm, params).encode(images),
            vlm.params,
            images,
        )
        lora, state = None, self.state
        if self.settings.lora_scale is not None:
            state = state.opt_state
            lora = Lora(weights=self.state.trainable["policy"], scale=self.settings.lora_scale)
        ints = jax.ShapeDtypeStruct((group_rows,), jnp.int32)
        tokens, mask = (jax.ShapeDtypeStruct((group_rows, length), dtype) for dtype in (jnp.int32, jnp.bool_))
        keys = jax.ShapeDtypeStruct((group_rows, *jax.random.key_data(jax.random.key(0)).shape), jnp.uint32)
        prompts = engine.Prompts(tokens, mask, ints, ints, keys, ints)
        decoder = engine.Engine(
            vlm.graphdef, vlm.params, sampling,
            slots=slots, columns=length + options.max_new_tokens, lora=lora, mesh=self.mesh,
        )  # fmt: skip
        rows = decoder.shapes(engine.PromptGroup([], prompts, encoded))
        static = vlm.graphdef, sampling, self.mesh
        yield PlannedPhase(
            "sweep: fill", (encoded, prompts), rows.cache,
            lambda: engine.fill.lower(*static, vlm.params, lora, rows, ints, prompts, encoded, None),
            state, held=True,
        )  # fmt: skip
        yield PlannedPhase(
            "sweep: decode", decoder.unstacked_shapes(), rows.cache,
            lambda: engine.decode.lower(*static, vlm.params, decoder.unstacked_shapes(), rows),
            [self.weights(policy=False), state], held=True,
        )  # fmt: skip

    def training_phases(self, get_program: GetProgram) -> Iterator[PlannedPhase]:
        """Yields the phases of an iteration of the run's algorithm."""
        return self.algorithm.planned(self, get_program)

    def outputs(
        self, phase: PlannedPhase, get_program: GetProgram, batch: int, function: Callable[..., Any], *arguments: Any,
        first: bool = False,
    ) -> Any:  # fmt: skip
        """Returns the results of a phase, which computes `function(*arguments)` for `batch` rows, as abstract arrays.

        They have the shardings of the compiled program; if there is no program, their rows are split over the mesh. If
        `first`, the function returns several results and only the first is returned.
        """
        program = get_program(phase)
        results = jax.eval_shape(function, *arguments) if program is None else phases.outputs(program)
        results = results[0] if first else results
        return self.rows(results, batch) if program is None else results

    def forward_flops(self) -> tuple[int, int]:
        """Returns (the model's operations, the adapters' operations) of a forward pass over a prompt and a response."""
        new_tokens = self.settings.sampling.max_new_tokens
        length = self.config.data.max_prompt_tokens + new_tokens - 1
        head = flops.logits(self.vlm.hidden_size, self.vlm.vocab_size)
        per_row = self.model.operations(length, length, 1)
        rank, targets = self.config.lora.rank, self.config.lora.targets
        adapted = [shape for name, shape in self.vlm.lora_shapes.items() if name.rpartition("/")[2] in targets]
        return per_row.forward + new_tokens * head, length * flops.adapters(adapted, rank)

    def encode_flops(self) -> int:
        """Returns the operations for the images of a batch: image encoder, and projector at one exit per row."""
        length = self.config.data.max_prompt_tokens
        per_row = self.model.operations(length, length, 1)
        return self.config.data.batch_size * (per_row.encode + per_row.visual)

    def rollout_work(self) -> PhaseWork:
        """Returns the cost of sampling the answers of a batch, token by token, each as long as allowed."""
        length, new_tokens = self.config.data.max_prompt_tokens, self.settings.sampling.max_new_tokens
        per_row = self.model.operations(length, length + new_tokens, 1)
        prompt_flops = per_row.encode + per_row.visual + per_row.prefill
        response_flops = (new_tokens - 1) * per_row.step
        rows = self.config.data.batch_size
        return PhaseWork(rows // self.group_size * prompt_flops + rows * response_flops, new_tokens)

    def update_work(self) -> PhaseWork:
        """Returns the cost of all updates of an iteration, including what `config.model.remat` computes again."""
        policy, adapters = self.forward_flops()
        recomputed = int(self.config.model.remat == "full")  # the backward pass repeats the forward pass
        trained, lora_scale = self.settings.trained, self.settings.lora_scale
        weight_gradients = int("policy" in trained and lora_scale is None)  # frozen weights need none
        epochs, batch = self.settings.epochs, self.config.data.batch_size
        length = self.config.data.max_prompt_tokens
        projector = 3 * self.model.operations(length, length, 1).project if "projector" in trained else 0
        adapted = (3 + recomputed) * adapters if lora_scale is not None else 0
        flops = epochs * batch * ((2 + weight_gradients + recomputed) * policy + adapted + projector)
        return PhaseWork(flops, epochs * self.slices * (2 + recomputed))


def _abstract_vlm(config: ConfigDict, mesh: Mesh | AbstractMesh) -> VLM:
    """Returns the model of `config.model` with abstract weights, from the sizes in its config.json."""
    model = config.model
    spec = checkpoint_directory(model.checkpoint)
    values = config_values(spec)
    where = f"{spec}: config.json"
    sizes = families.vlm_config(values, where, exit_rule=model.exit_rule, capture=model.intermediate_capture)
    sizes = families.family_of(sizes).with_files(sizes, Path(spec))
    build_network = functools.partial(families.family_of(sizes).network, sizes, remat=model.remat)
    graphdef, params = abstract_params(build_network, model.dtype, model.dtype)
    params = placed(params, shardings(params, mesh))
    return VLM(Checkpoint(graphdef, params, sizes, values, Path(spec)))


def _merge(vlm: VLM, params: Any) -> Any:
    """Returns the network of `vlm` with these parameters."""
    return nnx.merge(vlm.graphdef, params)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of abstract arrays on each chip; an array without a sharding is on every chip in full."""

    def size(leaf: jax.ShapeDtypeStruct | jax.Array) -> int:
        shape = leaf.shape
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            shape = leaf.sharding.shard_shape(leaf.shape)
        itemsize = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return int(np.prod(shape)) * itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
