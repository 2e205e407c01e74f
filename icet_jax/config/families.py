"""The model families that a `config.json` may name: a table that is read before jax is.

A family is one folder of `icet_jax.models` and one line here.
"""

from typing import NamedTuple


class FamilyName(NamedTuple):
    """One family by name.

    Attributes:
      title: as people call it.
      module: package whose `FAMILY` says everything about it.
    """

    title: str
    module: str


FAMILIES = {
    "llava": FamilyName("LLaVA-1.5", "icet_jax.models.llava"),
    "llava_next": FamilyName("LLaVA-NeXT", "icet_jax.models.llava_next"),
    "mllama": FamilyName("Llama 3.2 Vision", "icet_jax.models.mllama"),
}
"""`model_type` of a `config.json` -> family."""
