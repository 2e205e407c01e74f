"""Checks that a model's attention heads and a batch's rows divide evenly over the mesh.

Heads or rows that do not divide evenly would all be computed by every device.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from icet_jax.config import group_size
from icet_jax.errors import UserError


def check_heads(tensor: int, model: Any) -> None:
    """Raises a `UserError` that names possible sizes if the decoder's attention heads do not divide over `tensor`.

    Args:
      tensor: number of devices along the mesh axis `tensor`.
      model: config of a vision-language model of any family, whose `text` is the decoder's config.
    """
    text = getattr(model.text, "llama", model.text)
    heads = math.gcd(text.num_attention_heads, text.num_key_value_heads)
    if heads % tensor:
        fitting = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise UserError(
            f"config.mesh.tensor={tensor}: the decoder has {text.num_attention_heads} heads and "
            f"{text.num_key_value_heads} of keys and values, which do not divide over it; choose one of {fitting}"
        )


def slices(config: ConfigDict, shards: int) -> int:
    """Returns the number of slices into which a mini-batch is split to limit the memory of a device.

    It is `config.lppo.accumulation` or, if that does not divide the rows of each device, the next smaller number that
    does. A device's part of a slice then has at most as many rows as a slice would have on a single device. The number
    of slices does not change what is learned.

    Args:
      config: config of a run that trains.
      shards: number of devices that share the rows, mesh.data x mesh.fsdp.

    Raises:
      UserError: the rows of a mini-batch, or the prompts of a batch, do not divide over the devices; the message names
        batch sizes that do.
    """
    rows, minibatches, group = config.data.batch_size, config.lppo.minibatches, group_size(config)
    divisor = math.lcm(minibatches, group) * shards
    if rows % divisor:
        sizes = [str(size) for size in (rows // divisor * divisor, rows // divisor * divisor + divisor) if size]
        parts = [f"{minibatches} mini-batches"] * (minibatches > 1) + [f"groups of {group} responses"] * (group > 1)
        raise UserError(
            f"config.data.batch_size={rows}{' in ' * bool(parts)}{' and '.join(parts)} does not "
            f"divide over the {shards} devices of mesh.data x mesh.fsdp; choose {' or '.join(sizes)}, or more "
            "mesh.tensor"
        )
    minibatch_rows = rows // minibatches
    return next(count for count in range(config.lppo.accumulation, 0, -1) if minibatch_rows % (count * shards) == 0)
