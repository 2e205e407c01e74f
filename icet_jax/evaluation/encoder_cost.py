"""Counts what the image encoder costs at every exit, and measures how long the whole encoder takes for an image."""

import time
from collections.abc import Sequence
from statistics import median

import jax
from flax import nnx

from icet_jax.data.records import Example
from icet_jax.evaluation.batching import prompt_batch
from icet_jax.evaluation.geometry import image_batches
from icet_jax.evaluation.queue import encode
from icet_jax.files import JsonObject
from icet_jax.models import family_of
from icet_jax.models.base.encoder_work import encoder_bytes
from icet_jax.nn.protocols import Images
from icet_jax.vlm import VLM

SCHEMA = 1
_REPEATS = 5  # timed runs of the encoder, after one that is not timed


def encoder_cost(vlm: VLM, examples: Sequence[Example]) -> JsonObject:
    """Returns the content of `encoder.json` (`icet_jax.report.schema.EncoderCost`).

    Operations and bytes of each exit are arithmetic. The time is measured once, of the blocks of all exits together,
    with the program that `geometry` runs, so nothing is compiled for it.

    Args:
      vlm: the model.
      examples: rows; the first images of those that have one are encoded. Without any, no time is measured.

    Raises:
      UserError: an image cannot be opened.
    """
    work, length = family_of(vlm.config).encoder_work, 0
    batch = next(iter(image_batches(examples)), [])
    timing: JsonObject = {}
    if batch:
        arrays = prompt_batch(vlm, batch, len(batch), 1)
        length = arrays.tokens.shape[1]
        timing = {
            "milliseconds": 1e3 * _seconds(vlm, arrays.images) / len(batch),
            "measured_flops": nnx.merge(vlm.graphdef, vlm.params).operations(length, 1, 1).encode,
            "batch": len(batch),
        }
    exits = {layer: work(vlm.config, layer, length) for layer in range(1, vlm.num_exits + 1)}
    return {
        "schema": SCHEMA,
        "num_exits": vlm.num_exits,
        "default_exit": vlm.default_exit,
        "device": jax.devices()[0].device_kind,
        **timing,
        "layers": [
            {
                "layer": layer,
                "blocks": cost.blocks,
                "flops": cost.operations,
                "weight_bytes": encoder_bytes(vlm.params, cost.blocks),
            }
            for layer, cost in exits.items()
        ],
    }


def _seconds(vlm: VLM, images: Images | None) -> float:
    """Returns the median time in seconds in which the whole encoder processes the images of a batch."""

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(encode(vlm.graphdef, vlm.params, images))
        return time.perf_counter() - start

    seconds()
    return median(seconds() for _ in range(_REPEATS))
