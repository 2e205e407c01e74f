"""The scorers that a config names, each loaded once in a process and answered from the score cache where it can be.

refusal_keywords | organism:judge | a name of `config.scorers` | weights of a scorer (directory, hub id, toy:NAME)
"""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icet_jax.errors import UserError
from icet_jax.runs import loading
from icet_jax.runs.sources import checkpoint_directory
from icet_jax.scorers.base import Scorer
from icet_jax.scorers.cache import ScoreCache, cached

_LOADED: dict[tuple[Any, ...], Scorer] = {}


class ScorerLoader:
    """Loads scorers by their names in a config."""

    def __init__(self, config: ConfigDict, workdir: Path, mesh: Any = None) -> None:
        """`workdir`: where toy weights go, and the score cache unless the config names a folder."""
        self._definitions = config.scorers.to_dict()
        self._workdir, self._mesh = workdir, mesh
        self._cache = ScoreCache(config.sweep.score_cache or workdir / "scores")

    def __call__(self, name: str) -> Scorer:
        """One scorer, without the cache.

        Raises:
          UserError: it cannot be loaded, or an ensemble is a member of itself.
        """
        return self._load(name, ())

    def judges(self, names: Iterable[str]) -> list[Scorer]:
        """Scorers of a sweep, in order, behind the cache.

        Raises:
          UserError: one cannot be loaded.
        """
        return [cached(self(name), self._cache) for name in names]

    def _load(self, name: str, inside: tuple[str, ...]) -> Scorer:
        if name in inside:
            raise UserError(f"config.scorers.{name}: is a member of itself ({' -> '.join((*inside, name))})")
        definition = self._definitions.get(name)
        if definition is not None and "members" in definition:
            return self._defined(name, definition, inside)  # its members are what takes time, and are kept
        # Toy weights lie in the run directory; anything else is the same for every run of the process.
        place = str(self._workdir) if "toy:" in f"{name} {definition}" else ""
        key = (name, json.dumps(definition, sort_keys=True), place, self._mesh)
        if key not in _LOADED:
            _LOADED[key] = self._plain(name) if definition is None else self._defined(name, definition, inside)
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

    def _defined(self, name: str, definition: dict[str, Any], inside: tuple[str, ...]) -> Scorer:
        from icet_jax.scorers.load import load_defined

        definition = dict(definition)
        if "checkpoint" in definition:
            definition["checkpoint"] = checkpoint_directory(definition["checkpoint"], self._workdir)
        if str(definition.get("endpoint", "")).startswith("toy:"):
            from icet_jax.miniatures.service import chat

            return chat(definition)
        resolve = lambda member: self._load(member, (*inside, name))  # noqa: E731
        return load_defined(name, definition, mesh=self._mesh, resolve=resolve)
