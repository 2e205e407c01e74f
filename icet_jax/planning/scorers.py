"""Computes the memory that the weights of judges and reward model occupy on the chips during the whole run."""

from collections.abc import Iterable, Iterator

from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from icet_jax.checkpoints.published import scorer_values
from icet_jax.config.names import SCORERS
from icet_jax.files import JsonObject
from icet_jax.parallel.sharding import placed, shardings
from icet_jax.planning.ahead import bytes_per_device
from icet_jax.runs.sources import checkpoint_directory
from icet_jax.scorers.networks import abstract_scorer

_NO_NETWORK = (*(kind for kind, scorer in SCORERS.items() if not scorer.architectures), "organism:judge")


def scorer_bytes(config: ConfigDict, mesh: Mesh | AbstractMesh) -> dict[str, int | None]:
    """Returns {scorer: bytes per chip of its weights} for every scorer that a run of `config` loads.

    The value is None for a scorer of unknown size: a hub id that is not in `checkpoints.published.SCORERS`, or a toy.
    Scorers without a network of their own, such as keywords or a service, are left out.

    Args:
      config: config of the run.
      mesh: chips over which the weights are split.

    Raises:
      UserError: a checkpoint directory is broken, or its network is not supported.
    """
    definitions = config.scorers.to_dict()
    requested = [config.reward.model, *config.sweep.scorers]
    if config.sweep.utility:
        requested += config.sweep.utility_scorers
    names = dict.fromkeys(_replace_ensembles([name for name in requested if name], definitions))
    return {name: _weight_bytes(name, definitions.get(name), mesh) for name in names if _has_network(name, definitions)}


def _replace_ensembles(
    names: Iterable[str], definitions: dict[str, JsonObject], parents: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yields the names of scorers, where the members of an ensemble stand in place of the ensemble.

    `parents` are the ensembles that contain `names`. An ensemble that contains itself is left out; a run refuses it.
    """
    for name in names:
        members = definitions.get(name, {}).get("members")
        if members is None:
            yield name
        elif name not in parents:
            yield from _replace_ensembles(members, definitions, (*parents, name))


def _has_network(name: str, definitions: dict[str, JsonObject]) -> bool:
    """Returns whether a scorer computes with a network on the run's chips."""
    return definitions.get(name, {}).get("kind", name) not in _NO_NETWORK


def _weight_bytes(name: str, definition: JsonObject | None, mesh: Mesh | AbstractMesh) -> int | None:
    """Returns the bytes per chip of a scorer's weights; None if its size is unknown."""
    definition = definition or {"checkpoint": name}
    checkpoint = str(definition.get("checkpoint", name))
    values = None if checkpoint.startswith("toy:") else scorer_values(checkpoint_directory(checkpoint))
    if values is None:
        return None
    params = abstract_scorer(values, f"{checkpoint}: config.json", definition.get("dtype"))
    return bytes_per_device(placed(params, shardings(params, mesh)))
