"""Key table of LLaVA-NeXT (HF `LlavaNextForConditionalGeneration`)."""

from icet_jax.checkpoints.tables import SAME, Table, TableEntry
from icet_jax.models.llava.keys import llava_entries, normalise_llava
from icet_jax.models.llava_next.network import LlavaNextConfig


def llava_next_table(config: LlavaNextConfig) -> Table:
    """Returns the key table of LLaVA-NeXT: LLaVA-1.5's tensors and `image_newline`."""
    newline = TableEntry("image_newline", "image_newline", None, SAME)
    return Table((*llava_entries(config), newline), normalise_llava)
