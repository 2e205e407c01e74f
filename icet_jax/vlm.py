"""A vision-language model as one object with network, weights and processor, for notebooks, scripts and runs.

One model at three exits:

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
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import EncodedImages, Images, check_exit
from icet_jax.parallel.sharding import place_rows
from icet_jax.typing import Array, Bool, Float, Int, Key

Inputs = Mapping[str, Any]
"""Output of the family's HF processor: input_ids and attention_mask [B, T]; pixel_values and related arrays if there
are images."""


class VLM:
    """Holds a network with its weights and, from the first use on, its processor.

    Attributes:
      num_exits: number of exits, which are numbered 1..num_exits.
      default_exit: exit that the model was trained with.
      exit_definition: meaning of exit l in this family.
      graphdef: structure of the network; `nnx.merge(graphdef, params)` is the model, for use in your own functions.
      params: weights of the network.
      config: sizes of the network.
      directory: directory of the checkpoint.
      template: name of a chat template that replaces the checkpoint's; None to use the checkpoint's.
      adapter: LoRA of an adapter directory that was merged into `params` while the model was loaded, or None.
      lora: adapters that training added, separate from `params`, or None.
      mesh: mesh of the weights; None on the default device.
      eos_ids: tokens that end a response.
      pad_id: token that pads a response.
      max_positions: limit of the positions of a prompt, images included, plus its response; None if config.json sets
        none.
      suppress_ids: tokens that are never sampled.
      hidden_size: width of the decoder.
      lora_shapes: {projection of the decoder: (layers, input size, output size)}, as `init_lora` takes it.
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
        """Returns the processor, which turns `images=[...], prompts=[...]` into inputs; it is loaded on first use.

        Raises:
          UserError: the files of the tokenizer or image processor are missing or broken.
        """
        return load_processor(self.directory, self.config, self.template)

    def with_weights(self, params: nnx.State, lora: Lora | None = None) -> "VLM":
        """Returns the same model with other weights or adapters, such as trained ones; nothing is copied.

        Args:
          params: weights of the same network; `vlm.params` if only adapters are new.
          lora: adapters of the decoder that are used for every response (`icet_jax.nn.protocols.init_lora`), or None.
        """
        other = copy.copy(self)
        other.params, other.lora = params, lora
        return other

    def sampling(self, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
        """Returns sampling settings with this model's EOS, pad and suppressed tokens."""
        return Sampling(max_new_tokens, temperature, top_k, top_p, self.eos_ids, self.suppress_ids, self.pad_id)

    def misfit(self, ids: Sequence[int] | np.ndarray, max_new_tokens: int) -> str | None:
        """Returns None if a prompt and its response fit the limits of the tokenizer and the model; else says why not.

        Args:
          ids: tokens of the prompt, image positions included (`processor.token_ids`).
          max_new_tokens: largest number of tokens of the response.

        Raises:
          UserError: the processor cannot be loaded, see `processor`.
        """
        return self.processor.misfit(ids) or beyond_positions(len(ids), max_new_tokens, self.max_positions)

    def encode(self, inputs: Inputs, upto: int | None = None) -> "Encoding":
        """Runs the image encoder once for exits 1..upto, without the later blocks; None means all exits.

        `logits` and `generate` accept the result as `encoded`, so that several exits share one pass.

        Raises:
          UserError: `upto` is not an exit, images and text contradict each other, or the model cannot take the images.
        """
        last = self.num_exits if upto is None else check_exit(upto, self.num_exits, "upto")
        images = self._images(inputs)
        return Encoding(None if images is None else _encode(self.graphdef, self.params, images, last), last)

    def logits(
        self, inputs: Inputs, exit_layer: int | None = None, *, encoded: "Encoding | None" = None
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits of the next token at every position; logits at padding have no meaning.

        Args:
          inputs: see `Inputs`; padding may be on either side.
          exit_layer: 1..num_exits; None is the default exit.
          encoded: result of `encode` for the same inputs.

        Raises:
          UserError: the exit is out of range, or the inputs do not fit each other or the model.
        """
        tokens, mask = self._text(inputs)
        encoded = self.encode(inputs) if encoded is None else encoded
        exit_index = self._exit(exit_layer, encoded.upto)
        return _logits(self.graphdef, self.params, self.lora, encoded.images, exit_index, tokens, mask)

    def hidden_states(self, inputs: Inputs) -> Float[Array, "X I P D"]:
        """Returns hidden states 0..num_exits (axis X) of the image encoder for I images.

        State 0 is the input of the first block, state l the output of block l. The first of the P positions is the
        class token, except in SmolVLM and Qwen2.5-VL, which have none.

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
        """Generates a response for every row.

        A response depends only on the row's prompt, its images, its index in the batch, the exit, the settings and the
        seed.

        Args:
          inputs: see `Inputs`; padding may be on either side.
          exit_layer: 1..num_exits; None is the default exit.
          max_new_tokens: A, the largest number of tokens of a response.
          temperature: 0 is greedy.
          top_k: only the k most probable tokens are sampled; 0 = off.
          top_p: only the most probable tokens that together reach this probability are sampled; 1 = off.
          seed: seed of the sampling.
          encoded: result of `encode` for the same inputs.

        Raises:
          UserError: the exit or a setting is out of range, the inputs do not fit each other or the model, or logits are
            NaN or infinite (the message names the exit and the row, from 0).
        """
        sampling = self.sampling(max_new_tokens, temperature, top_k, top_p)
        tokens, mask = self._text(inputs, max_new_tokens)
        encoded = self.encode(inputs) if encoded is None else encoded
        exit_index = self._exit(exit_layer, encoded.upto)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(tokens.shape[0]))
        weights = (self.graphdef, self.params, self.lora)
        out = _answer(*weights, encoded.images, exit_index, tokens, mask, keys, sampling)
        responses, log_probs, is_response = map(np.asarray, out)
        for row in range(len(responses)):
            check_log_probs(log_probs[row, is_response[row]], f"exit {int(exit_index)}, row {row}")
        return Responses(
            responses, log_probs, is_response, decode=lambda tokens, mask: self.processor.decode(tokens, mask)
        )

    def save(self, directory: str | Path, exit_layer: int | None = None) -> Path:
        """Writes the model to a new directory in the Hugging Face layout, which transformers 4.46 to 5.x can load.

        `lora` and the adapter that was merged when the model was loaded are part of the written weights. With several
        processes all of them call this method, and the first one writes.

        Args:
          directory: the directory to write.
          exit_layer: the only exit of the written model, see `icet_jax.models.saving.save_vlm`; None writes the whole
            model.

        Returns:
          `directory` as a path.

        Raises:
          UserError: the directory cannot be written, or there is no such exit.
        """
        if exit_layer is not None:
            self._exit(exit_layer, self.num_exits)
        return save_vlm(
            directory, self.config, self.params, source_dir=self.directory, start=self.adapter, lora=self.lora,
            exit_layer=exit_layer,
        )  # fmt: skip

    def _exit(self, exit_layer: int | None, upto: int) -> Int[Array, ""]:
        """Returns the exit (None: the default one) as an array; raises UserError if it is beyond 1..`upto`."""
        number = self.default_exit if exit_layer is None else exit_layer
        if not isinstance(number, int | np.integer) or isinstance(number, bool):
            raise UserError(f"exit_layer: {exit_layer!r} given; this model has exits 1..{self.num_exits}")
        if exit_layer is not None:
            check_exit(int(number), self.num_exits, "exit_layer")
        if number > upto:
            raise UserError(f"exit_layer: {number} is beyond `upto` ({upto}), where this encoding stopped")
        return jnp.int32(number)

    def _text(self, inputs: Inputs, max_new_tokens: int = 0) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """Returns (tokens, mask) of the inputs on the devices; raises UserError if shapes, ids or lengths are wrong."""
        tokens = np.asarray(_entry(inputs, "input_ids"))
        mask = np.asarray(inputs["attention_mask"]) if "attention_mask" in inputs else np.ones_like(tokens)
        if tokens.ndim != 2 or tokens.shape != mask.shape:
            raise UserError(f"inputs: input_ids {tokens.shape} and attention_mask {mask.shape} must both be [B, T]")
        last = max(self.vocab_size - 1, self.config.image_token_index)  # the image token may be outside the vocabulary
        if tokens.size and not 0 <= tokens.min() <= tokens.max() <= last:
            raise UserError(f"inputs: input_ids reach {tokens.max()}, but this model's tokens are 0..{last}")
        for row, length in enumerate(np.count_nonzero(mask, axis=1)):
            problem = beyond_positions(int(length), max_new_tokens, self.max_positions)
            if problem is not None:
                raise UserError(f"row {row}: {problem}")
        return place_rows((tokens.astype(np.int32), mask.astype(bool)), self.mesh)

    def _images(self, inputs: Inputs) -> Images | None:
        """Returns the images of the inputs on the devices, or None if they have none."""
        tokens = np.asarray(_entry(inputs, "input_ids"))
        images = batch_images(self.config, inputs, num_rows=len(tokens))
        return None if images is None else place_rows(images, self.mesh)


class Encoding(NamedTuple):
    """Holds images that are encoded once for many exits.

    Attributes:
      images: encoder states at the exits, in the family's pytree; None if the inputs have no images.
      upto: last exit for which the states were computed.
    """

    images: Any
    upto: int


class Responses:
    """Holds the responses that `VLM.generate` returns, for B rows of at most A tokens.

    Attributes:
      tokens: int [B, A]; the pad token after the end of a response.
      log_probs: float32 [B, A], log-probs of the tokens in nats, at the temperature used (1 when greedy), before top-k
        and top-p.
      mask: bool [B, A], True at the response up to and including its EOS.
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
        """Returns the responses as text, without special tokens.

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
    encoded: EncodedImages,
    exit_index: Int[Array, ""],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T V"]:
    model = nnx.merge(graphdef, params)
    visual = None if encoded is None else model.visual(encoded, exit_index)
    hidden = model.decode(tokens, model.positions(tokens, mask, visual), mask, visual, lora)
    return model.logits(hidden)


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"))
def _answer(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    lora: Lora | None,
    encoded: EncodedImages,
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
