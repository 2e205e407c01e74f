"""What a scorer is made from: an entry of `config.scorers`, or a checkpoint that judges."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax

from icet_jax.checkpoints.hf_import import Checkpoint
from icet_jax.files import JsonObject
from icet_jax.scorers.base import Scorer
from icet_jax.scorers.cache import directory_fingerprint

Template = Callable[[str, str], str] | str | None

STORED_SETTINGS = "icet_jax"
"""Key of config.json under which `save_reward_model` stores the template and the name; transformers ignores it."""

_LONGEST = 4096  # most tokens of a Llama's input, to limit memory


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of `config.scorers` without a checkpoint.

    Attributes:
      name: name of the entry.
      resolve: loads another scorer by its name, such as a member of an ensemble.
    """

    name: str
    resolve: Callable[[str], Scorer]


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """Describes a checkpoint that will become a scorer; its weights are loaded after everything else has been checked.

    Attributes:
      config: its config.json.
      kind: a kind of `icet_jax.config.names.SCORERS`.
      tokenizer: transformers' tokenizer.
      template: template of the caller, or None.
      load: loads the weights.
      common: arguments that every kind of scorer takes.
      identity: its path or hub id, and the name in its config.
    """

    config: JsonObject
    kind: str
    tokenizer: Any
    template: Template
    identity: str
    load: Callable[[], Checkpoint]
    common: dict[str, Any]

    @property
    def positions(self) -> int:
        """Most tokens that the network reads, bounded for memory."""
        default = {"llama": 2048, "deberta-v2": 512}[self.config["model_type"]]  # transformers' class defaults
        return min(self.config.get("max_position_embeddings") or default, _LONGEST)


def fingerprint(checkpoint: Checkpoint, *settings: Any) -> str:
    """Returns a hash of the weights, the dtype, and the settings of how texts are presented."""
    dtype = str(jax.tree.leaves(checkpoint.params)[0].dtype)
    facts = json.dumps([directory_fingerprint(checkpoint.directory), dtype, *settings])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
