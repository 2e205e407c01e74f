"""Whether a model's heads and a batch's rows divide over the mesh; what does not would be computed by every device."""

import math
from typing import Any

from ml_collections import ConfigDict

from icet_jax.errors import UserError


def check_heads(tensor: int, model: Any) -> None:
    """The decoder's heads divide over the axis `tensor`.

    Args:
      tensor: size of the axis.
      model: the sizes of a vision-language model, of any family.

    Raises:
      UserError: they do not; the sizes that would fit are named.
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
    """How many slices a mini-batch is trained in: `config.lppo.accumulation`, or fewer where devices share the rows.

    Slices keep what a device holds at once small. They are made longer until each has as many rows for every device,
    which then holds no more rows than one device would have; what is learnt from them does not change.

    Args:
      config: of a run that trains.
      shards: devices along `mesh.data` x `mesh.fsdp`.

    Raises:
      UserError: the rows of a mini-batch do not divide over the devices; sizes that would fit are named.
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
