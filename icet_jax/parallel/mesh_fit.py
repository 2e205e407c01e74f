"""Checks that a model's heads and a batch's rows can be divided over the mesh; every device would compute the rest."""

import math
from typing import Any

from ml_collections import ConfigDict

from icet_jax.errors import UserError


def check_heads(tensor: int, model: Any) -> None:
    """Checks that the decoder's heads can be divided over the axis `tensor`.

    Args:
      tensor: size of the axis.
      model: sizes of a vision-language model of any family.

    Raises:
      UserError: they cannot; the message names the sizes that fit.
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
    """Returns the number of slices of a mini-batch: `config.lppo.accumulation`, or fewer if devices share the rows.

    Slices limit the memory of a device. They are made longer until each has the same number of rows for every device,
    which then has no more rows than a single device would have. This does not change what is learned.

    Args:
      config: config of a run that trains.
      shards: devices along `mesh.data` x `mesh.fsdp`.

    Raises:
      UserError: the rows of a mini-batch cannot be divided over the devices; the message names sizes that fit.
    """
    rows, parts = config.data.batch_size, config.lppo.minibatches
    if rows % (parts * shards):
        step = parts * shards
        sizes = [str(size) for size in (rows // step * step, rows // step * step + step) if size]
        raise UserError(
            f"config.data.batch_size={rows}{f' in {parts} mini-batches' if parts > 1 else ''} does not divide over the "
            f"{shards} devices of mesh.data x mesh.fsdp; choose {' or '.join(sizes)}, or more mesh.tensor"
        )
    each = rows // parts
    return next(count for count in range(config.lppo.accumulation, 0, -1) if each % (count * shards) == 0)
