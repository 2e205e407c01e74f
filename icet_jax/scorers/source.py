"""What a scorer is created from: an entry of `config.scorers`, or a checkpoint."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax

from icet_jax.checkpoints.decoders import readable_tokens
from icet_jax.checkpoints.hf_import import Checkpoint
from icet_jax.config.names import DECODERS
from icet_jax.files import JsonObject
from icet_jax.media.limits import max_positions
from icet_jax.media.tokenizer import Tokenizer
from icet_jax.scorers.base import Scorer
from icet_jax.scorers.cache import directory_fingerprint

Template = Callable[[str, str], str] | str | None
"""A caller's choice of template: a function of (prompt, response), a text or name, or None for the scorer's default."""

STORED_SETTINGS = "icet_jax"
"""Key of config.json under which `save_reward_model` stores the template and the name; transformers ignores it."""

_MEMORY_LIMIT = 4096  # most tokens that a scorer reads even if its network has more positions, to limit memory


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of `config.scorers` whose kind needs no checkpoint, such as an ensemble or a chat endpoint.

    Attributes:
      name: name of the entry.
      resolve: loads another scorer by its name, such as a member of an ensemble.
    """

    name: str
    resolve: Callable[[str], Scorer]


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """Describes a checkpoint that will become a scorer.

    Attributes:
      config: the parsed config.json of the checkpoint.
      kind: a kind of `icet_jax.config.names.SCORERS`.
      tokenizer: transformers' tokenizer.
      template: see `Template`.
      identity: path or hub id of the checkpoint, and the name in its config.
      load: function that loads network and weights; to be called after everything else has been checked.
      common: arguments that every kind of scorer takes (`name`, `mesh` and `batch_size`).
    """

    config: JsonObject
    kind: str
    tokenizer: Tokenizer
    template: Template
    identity: str
    load: Callable[[], Checkpoint]
    common: dict[str, Any]

    @property
    def positions(self) -> int:
        """Largest number of tokens of a text: as many as the network can read, but at most `_MEMORY_LIMIT`."""
        if self.config["model_type"] in DECODERS:
            longest = readable_tokens(self.config)
        elif "text_config" in self.config:
            longest = max_positions(self.config) or 2048  # transformers' class default for Llama
        else:
            longest = self.config.get("max_position_embeddings") or 512  # transformers' class default for DeBERTa
        return min(longest, _MEMORY_LIMIT)


def fingerprint(checkpoint: Checkpoint, *settings: Any) -> str:
    """Returns a hash of a checkpoint's files, its dtype and `settings`, JSON values such as the template."""
    dtype = str(jax.tree.leaves(checkpoint.params)[0].dtype)
    facts = json.dumps([directory_fingerprint(checkpoint.directory), dtype, *settings])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
