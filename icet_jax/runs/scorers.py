"""Loads the scorers that a config names, each once per process, with the score cache in front.

refusal_keywords | organism:judge | a name of `config.scorers` | weights of a scorer (directory, hub id, toy:NAME)
"""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.runs import loading
from icet_jax.runs.sources import checkpoint_directory
from icet_jax.scorers.base import Scorer
from icet_jax.scorers.cache import ScoreCache, cached

_LOADED: dict[tuple[Any, ...], Scorer] = {}


class ScorerLoader:
    """Loads scorers by their names in a config."""

    def __init__(self, config: ConfigDict, workdir: Path, mesh: Any = None) -> None:
        """Stores the definitions; toy weights, and the score cache unless the config names a folder, are put in
        `workdir`."""
        self._definitions = config.scorers.to_dict()
        self._workdir, self._mesh = workdir, mesh
        self._cache = ScoreCache(config.sweep.score_cache or workdir / "scores")

    def __call__(self, name: str) -> Scorer:
        """Returns one scorer without the cache.

        Raises:
          UserError: it cannot be loaded, or an ensemble is a member of itself.
        """
        return self._load(name, ())

    def judges(self, names: Iterable[str]) -> list[Scorer]:
        """Returns the scorers of a sweep, in order, with the cache.

        Raises:
          UserError: a scorer cannot be loaded.
        """
        return [cached(self(name), self._cache) for name in names]

    def _load(self, name: str, parents: tuple[str, ...]) -> Scorer:
        if name in parents:
            raise UserError(f"config.scorers.{name}: is a member of itself ({' -> '.join((*parents, name))})")
        definition = self._definitions.get(name)
        if definition is not None and "members" in definition:
            return self._defined(name, definition, parents)  # only its members take time to load, and they are stored
        # Toy weights depend on the run directory; all others are the same for every run of the process.
        toy_folder = str(self._workdir) if "toy:" in f"{name} {definition}" else ""
        key = (name, json.dumps(definition, sort_keys=True), toy_folder, self._mesh)
        if key not in _LOADED:
            _LOADED[key] = self._plain(name) if definition is None else self._defined(name, definition, parents)
        return _LOADED[key]

    def _plain(self, name: str) -> Scorer:
        place = checkpoint_directory(name, self._workdir) if name.startswith("toy:") else name
        try:
            return loading.load_scorer(place, mesh=self._mesh)
        except UserError as error:
            near = difflib.get_close_matches(name, self._definitions, n=1)
            if not near:
                raise
            raise UserError(f"{name}: did you mean {near[0]}, of config.scorers? ({error})") from error

    def _defined(self, name: str, definition: JsonObject, parents: tuple[str, ...]) -> Scorer:
        from icet_jax.scorers.load import load_defined

        definition = dict(definition)
        if "checkpoint" in definition:
            definition["checkpoint"] = checkpoint_directory(definition["checkpoint"], self._workdir)
        if str(definition.get("endpoint", "")).startswith("toy:"):
            from icet_jax.miniatures.service import chat

            return chat(definition)
        resolve = lambda member: self._load(member, (*parents, name))  # noqa: E731
        return load_defined(name, definition, mesh=self._mesh, resolve=resolve)
