"""A vision-language model as one object: network, weights and processor, for notebooks, scripts and our own runs.

One model, asked at three exits:

    vlm = icet_jax.load("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
    inputs = vlm.processor(images=["cat.png"], prompts=["What is this?"])
    for exit_layer in (6, 18, vlm.default_exit):
        print(exit_layer, vlm.generate(inputs, exit_layer=exit_layer).texts)
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.checkpoints.hf_import import Checkpoint
from icet_jax.checkpoints.source import generation_tokens
from icet_jax.errors import UserError
from icet_jax.generation.decode import Generation, generate
from icet_jax.generation.sampling import Sampling, check_log_probs, suppress_ids
from icet_jax.media.limits import beyond_positions, max_positions
from icet_jax.models.base.image_batches import batch_images
from icet_jax.models.base.processor import Processor, load_processor
from icet_jax.models.saving import save_vlm
from icet_jax.nn.layers import Lora, positions_from_mask
from icet_jax.nn.protocols import Images, check_exit
from icet_jax.parallel.sharding import place_rows
from icet_jax.typing import Array, Bool, Float, Int, Key

Inputs = Mapping[str, Any]
"""What the family's HF processor returns: input_ids and attention_mask [B, T]; pixel_values and their like if there are
images."""


class VLM:
    """A network with its weights and, on first use, its processor.

    Attributes:
      num_exits: exits are numbered 1..num_exits.
      default_exit: the one that the model was trained on.
      exit_definition: what exit l of this family means.
      graphdef: of the network; `nnx.merge(graphdef, params)` is the model, for pure functions of your own.
      params: its weights.
      config: sizes of the network.
      directory: where it came from.
      template: name of a chat template instead of the checkpoint's own, or None.
      adapter: the LoRA that was merged while it was loaded, or None.
      lora: what training added since, as adapters beside the weights, or None.
      mesh: where the weights are, None on the default device.
      eos_ids: tokens that end a response.
      pad_id: the token that pads one.
      max_positions: most that a prompt, images included, and its answer may take; None where config.json names none.
      suppress_ids: tokens that are never sampled.
      hidden_size: width of the decoder.
      lora_shapes: its projections that LoRA can adapt (`init_lora`).
    """

    def __init__(
        self, checkpoint: Checkpoint, mesh: jax.sharding.Mesh | None = None, template: str | None = None
    ) -> None:
        self.graphdef: nnx.GraphDef = checkpoint.graphdef
        self.params: nnx.State = checkpoint.params
        self.config: Any = checkpoint.config
        self.directory: Path = checkpoint.directory
        self.mesh: jax.sharding.Mesh | None = mesh
        self.template = template
        self.adapter = checkpoint.adapter
        self.lora: Lora | None = None
        model = checkpoint.model
        eos_ids, pad_id = generation_tokens(checkpoint.directory, checkpoint.hf_config, model.vocab_size)
        self.eos_ids: tuple[int, ...] = eos_ids
        self.pad_id: int = pad_id
        self.max_positions = max_positions(checkpoint.hf_config)
        self.num_exits: int = model.num_exits
        self.default_exit: int = model.default_exit
        self.exit_definition: str = model.exit_definition
        self.vocab_size: int = model.vocab_size
        self.hidden_size: int = model.hidden_size
        self.lora_shapes: dict[str, tuple[int, int, int]] = model.lora_shapes()
        self.suppress_ids = suppress_ids(model.image_token_index, self.pad_id, self.eos_ids)

    @functools.cached_property
    def processor(self) -> Processor:
        """`processor(images=[...], prompts=[...])` -> inputs.

        Raises:
          UserError: the checkpoint has no tokenizer or image-processor files, or broken ones.
        """
        return load_processor(self.directory, self.config, self.template)

    def with_weights(self, params: nnx.State, lora: Lora | None = None) -> "VLM":
        """The same model with other weights or adapters, such as trained ones; nothing is copied.

        Args:
          params: of the same network; `vlm.params` where only adapters are new.
          lora: adapters of the decoder that every answer goes through (`icet_jax.nn.protocols.init_lora`); None: none.
        """
        other = copy.copy(self)
        other.params, other.lora = params, lora
        return other

    def sampling(self, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
        """How this model's responses are drawn: its own EOS and pad tokens; placeholder and pad are never sampled."""
        return Sampling(max_new_tokens, temperature, top_k, top_p, self.eos_ids, self.suppress_ids, self.pad_id)

    def misfit(self, ids: Sequence[int] | np.ndarray, max_new_tokens: int) -> str | None:
        """Why a prompt and its answer are longer than the tokenizer or the model takes, or None.

        Args:
          ids: tokens of the prompt, image positions included (`processor.token_ids`).
          max_new_tokens: of the longest answer.

        Raises:
          UserError: see `processor`.
        """
        return self.processor.misfit(ids) or beyond_positions(len(ids), max_new_tokens, self.max_positions)

    def encode(self, inputs: Inputs, upto: int | None = None) -> "Encoding":
        """Runs the image encoder once for all exits, or for those up to `upto` (the blocks after it are skipped).

        `logits` and `generate` take the result as `encoded`, so that several exits share one pass.

        Raises:
          UserError: `upto` is no exit, or the inputs do not fit each other or the model.
        """
        last = self.num_exits if upto is None else check_exit(upto, self.num_exits, "upto")
        images = self._images(inputs)
        return Encoding(None if images is None else _encode(self.graphdef, self.params, images, last), last)

    def logits(
        self, inputs: Inputs, exit_layer: int | None = None, *, encoded: "Encoding | None" = None
    ) -> Float[Array, "B T V"]:
        """Float32 next-token logits at every position; those at padding mean nothing.

        Args:
          inputs: see `Inputs`; padding on either side.
          exit_layer: 1..num_exits; None is the default exit.
          encoded: of the same inputs, from `encode`.

        Raises:
          UserError: an exit out of range, or inputs that do not fit each other or the model.
        """
        tokens, mask = self._text(inputs)
        encoded = self.encode(inputs) if encoded is None else encoded
        exit_index = self._exit(exit_layer, encoded.upto)
        return _logits(self.graphdef, self.params, self.lora, encoded.images, exit_index, tokens, mask)

    def hidden_states(self, inputs: Inputs) -> Float[Array, "X I P D"]:
        """States 0..num_exits of the image encoder, class token first; index 0 is what enters its first block.

        Raises:
          UserError: `inputs` has no images.
        """
        images = self._images(inputs)
        if images is None:
            raise UserError("hidden_states: these inputs have no images (pixel_values)")
        return _hidden_states(self.graphdef, self.params, images)

    def generate(
        self,
        inputs: Inputs,
        exit_layer: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        encoded: "Encoding | None" = None,
    ) -> "Responses":
        """Answers every row. A row's answer depends on its prompt, images, number and the seed alone.

        Args:
          inputs: see `Inputs`; padding on either side.
          exit_layer: 1..num_exits; None is the default exit.
          max_new_tokens: A, the longest answer.
          temperature: 0 is greedy.
          top_k: sample among the k likeliest tokens; 0 = off.
          top_p: sample among the likeliest tokens that together have this probability; 1 = off.
          seed: of the sampling.
          encoded: of the same inputs, from `encode`.

        Raises:
          UserError: an exit or a setting out of range, inputs that do not fit each other or the model, or logits that
            are NaN or infinite (the message names the exit and the row, from 0).
        """
        sampling = self.sampling(max_new_tokens, temperature, top_k, top_p)
        tokens, mask = self._text(inputs, max_new_tokens)
        encoded = self.encode(inputs) if encoded is None else encoded
        exit_index = self._exit(exit_layer, encoded.upto)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(tokens.shape[0]))
        weights = (self.graphdef, self.params, self.lora)
        out = _answer(*weights, encoded.images, exit_index, tokens, mask, keys, sampling)
        responses, log_probs, answered = map(np.asarray, out)
        for row in range(len(responses)):
            check_log_probs(log_probs[row, answered[row]], f"exit {int(exit_index)}, row {row}")
        return Responses(
            responses, log_probs, answered, decode=lambda tokens, mask: self.processor.decode(tokens, mask)
        )

    def save(self, directory: str | Path) -> Path:
        """Writes the model to a new directory in the Hugging Face layout; transformers 4.46 to 5.x load it.

        An adapter that was merged when the model was loaded is part of what is written, and so is `lora`. With several
        processes all of them call it; the first one writes.

        Raises:
          UserError: it cannot be written there.
        """
        source, start = self.directory, self.adapter
        return save_vlm(directory, self.config, self.params, source_dir=source, start=start, lora=self.lora)

    def _exit(self, exit_layer: int | None, upto: int) -> Int[Array, ""]:
        number = self.default_exit if exit_layer is None else exit_layer
        if not isinstance(number, int | np.integer) or isinstance(number, bool):
            raise UserError(f"exit_layer: {exit_layer!r} given; this model has exits 1..{self.num_exits}")
        if exit_layer is not None:
            check_exit(int(number), self.num_exits, "exit_layer")
        if number > upto:
            raise UserError(f"exit_layer: {number} is beyond `upto` ({upto}), where this encoding stopped")
        return jnp.int32(number)

    def _text(self, inputs: Inputs, max_new_tokens: int = 0) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        tokens = np.asarray(_entry(inputs, "input_ids"))
        mask = np.asarray(inputs["attention_mask"]) if "attention_mask" in inputs else np.ones_like(tokens)
        if tokens.ndim != 2 or tokens.shape != mask.shape:
            raise UserError(f"inputs: input_ids {tokens.shape} and attention_mask {mask.shape} must both be [B, T]")
        last = max(self.vocab_size - 1, self.config.image_token_index)  # which may be no token of the vocabulary
        if tokens.size and not 0 <= tokens.min() <= tokens.max() <= last:
            raise UserError(f"inputs: input_ids reach {tokens.max()}, but this model's tokens are 0..{last}")
        for row, length in enumerate(np.count_nonzero(mask, axis=1)):
            problem = beyond_positions(int(length), max_new_tokens, self.max_positions)
            if problem is not None:
                raise UserError(f"row {row}: {problem}")
        return place_rows((tokens.astype(np.int32), mask.astype(bool)), self.mesh)

    def _images(self, inputs: Inputs) -> Images | None:
        tokens = np.asarray(_entry(inputs, "input_ids"))
        images = batch_images(self.config, inputs, num_rows=len(tokens))
        return None if images is None else place_rows(images, self.mesh)


class Encoding(NamedTuple):
    """Images encoded once for many exits.

    Attributes:
      images: the family's own pytree; None where the inputs have no images.
      upto: the last exit it serves.
    """

    images: Any
    upto: int


class Responses:
    """What `VLM.generate` returns.

    Attributes:
      tokens: int [B, A]; the pad token after the end.
      log_probs: float32 [B, A] of the tokens, in nats, at the temperature used (1 when greedy), before top-k and top-p.
      mask: bool [B, A]: the response, up to and including its EOS.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        log_probs: np.ndarray,
        mask: np.ndarray,
        *,
        decode: Callable[[np.ndarray, np.ndarray], list[str]],
    ) -> None:
        self.tokens, self.log_probs, self.mask = tokens, log_probs, mask
        self._decode = decode

    @functools.cached_property
    def texts(self) -> list[str]:
        """The responses as text, without special tokens.

        Raises:
          UserError: the checkpoint has no tokenizer files.
        """
        return self._decode(self.tokens, self.mask)


def _entry(inputs: Inputs, name: str) -> Any:
    if name not in inputs:
        raise UserError(f"inputs: '{name}' is missing; give what the processor returns")
    return inputs[name]


@functools.partial(jax.jit, static_argnames=("graphdef", "upto"))
def _encode(graphdef: nnx.GraphDef, params: nnx.State, images: Images, upto: int) -> Any:
    return nnx.merge(graphdef, params).encode(images, upto)


@functools.partial(jax.jit, static_argnames="graphdef")
def _logits(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    lora: Lora | None,
    encoded: Any,
    exit_index: Int[Array, ""],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T V"]:
    model = nnx.merge(graphdef, params)
    visual = None if encoded is None else model.visual(encoded, exit_index)
    hidden = model.decode(tokens, positions_from_mask(mask), mask, visual, lora)
    return model.logits(hidden)


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"))
def _answer(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    lora: Lora | None,
    encoded: Any,
    exit_index: Int[Array, ""],
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    row_keys: Key[Array, "B"],
    sampling: Sampling,
) -> Generation:
    model = nnx.merge(graphdef, params)
    visual = None if encoded is None else model.visual(encoded, exit_index)
    return generate(model, tokens, mask, visual, row_keys, sampling, lora)


@functools.partial(jax.jit, static_argnames="graphdef")
def _hidden_states(graphdef: nnx.GraphDef, params: nnx.State, images: Images) -> Float[Array, "X I P D"]:
    return nnx.merge(graphdef, params).hidden_states(images)
