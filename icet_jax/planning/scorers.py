"""What judges and the reward model take of the chips: their weights, which stay from the first sweep to the last."""

from collections.abc import Iterable, Iterator
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from icet_jax.checkpoints.published import scorer_values
from icet_jax.checkpoints.scorers import abstract_scorer
from icet_jax.config.names import SCORERS
from icet_jax.parallel.sharding import placed, shardings
from icet_jax.planning.ahead import bytes_per_device
from icet_jax.runs.sources import checkpoint_directory

_NO_NETWORK = (*(kind for kind, scorer in SCORERS.items() if not scorer.architectures), "organism:judge")


def scorer_bytes(config: ConfigDict, mesh: Mesh | AbstractMesh) -> dict[str, int | None]:
    """Bytes per chip of the weights of every scorer that a run of `config` loads, by name.

    None is one whose sizes are not known: a hub id that is not among `checkpoints.published.SCORERS`, or a toy.

    Raises:
      UserError: a checkpoint directory that is broken, or a network that is not supported.
    """
    definitions = config.scorers.to_dict()
    asked = [config.reward.model, *config.sweep.scorers]
    if config.sweep.utility:
        asked += config.sweep.utility_scorers
    names = dict.fromkeys(_members([name for name in asked if name], definitions))
    return {name: _weights(name, definitions.get(name), mesh) for name in names if _has_network(name, definitions)}


def _members(names: Iterable[str], definitions: dict[str, Any], inside: tuple[str, ...] = ()) -> Iterator[str]:
    """The scorers themselves and, instead of ensembles, their members (a run refuses an ensemble within itself)."""
    for name in names:
        members = definitions.get(name, {}).get("members")
        if members is None:
            yield name
        elif name not in inside:
            yield from _members(members, definitions, (*inside, name))


def _has_network(name: str, definitions: dict[str, Any]) -> bool:
    return definitions.get(name, {}).get("kind", name) not in _NO_NETWORK


def _weights(name: str, definition: dict[str, Any] | None, mesh: Mesh | AbstractMesh) -> int | None:
    definition = definition or {"checkpoint": name}
    checkpoint = str(definition.get("checkpoint", name))
    values = None if checkpoint.startswith("toy:") else scorer_values(checkpoint_directory(checkpoint))
    if values is None:
        return None
    params = abstract_scorer(values, f"{checkpoint}: config.json", definition.get("dtype"))
    return bytes_per_device(placed(params, shardings(params, mesh)))
