"""What the image encoder computes and keeps for one exit, by arithmetic from the network's config."""

import dataclasses

from flax import nnx

from icet_jax.parallel.sharding import flatten_with_names

_TOWER = "vision_tower/"
_BLOCKS = "vision_tower/layers/"


@dataclasses.dataclass(frozen=True)
class EncoderWork:
    """Holds what encoding one image takes if only one exit is used.

    Attributes:
      blocks: number of the encoder's blocks that run, of those that can be left out.
      operations: floating-point operations of one image (of all its tiles), as `icet_jax.nn.flops` counts them.
    """

    blocks: int
    operations: int


def encoder_bytes(params: nnx.State, blocks: int) -> int:
    """Returns the bytes of the image encoder's weights, without those of the blocks after the first `blocks`.

    Args:
      params: parameters of a network of any family, or their shapes; they count in their own dtype.
      blocks: number of blocks that are kept (`EncoderWork.blocks`).
    """
    leaves = {path: leaf for path, leaf in flatten_with_names(params).items() if path.startswith(_TOWER)}
    sizes = {path: leaf.size * leaf.dtype.itemsize for path, leaf in leaves.items()}
    # The first axis of a block's parameters is the number of blocks.
    return sum(
        size * blocks // leaves[path].shape[0] if path.startswith(_BLOCKS) else size for path, size in sizes.items()
    )
