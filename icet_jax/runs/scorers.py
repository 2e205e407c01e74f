"""Loads the scorers that a config names, each once per process.

A name is "refusal_keywords", "organism:judge", a key of `config.scorers`, or a scorer's weights (a directory, a hub id
or "toy:NAME").
"""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.runs import loading
from icet_jax.runs.sources import checkpoint_directory
from icet_jax.scorers.base import Scorer
from icet_jax.scorers.cache import ScoreCache, cached

_EMBEDDED = ("refusal_keywords", "organism:judge", "organism:reward_model")
_LOADED: dict[tuple[str, str, str, Mesh | None], Scorer] = {}
"""Loaded scorers by (name, definition as JSON, folder of toy weights or "", mesh)."""


class ScorerLoader:
    """Loads scorers by their names in a config."""

    def __init__(self, config: ConfigDict, workdir: Path, mesh: Mesh | None = None) -> None:
        """Prepares loading; no scorer is loaded yet.

        Args:
          config: config of the run.
          workdir: folder for toy weights, and for cached scores unless `config.sweep.score_cache` is set.
          mesh: mesh of the scorers' weights; None for the default device.
        """
        self._definitions = config.scorers.to_dict()
        self._workdir, self._mesh = workdir, mesh
        self._cache = ScoreCache(config.sweep.score_cache or workdir / "scores")

    def __call__(self, name: str) -> Scorer:
        """Returns the scorer named `name` without a cache: it computes every score when it is called.

        Raises:
          UserError: the scorer cannot be loaded, or an ensemble is a member of itself.
        """
        return self._load(name, ())

    def judges(self, names: Iterable[str]) -> list[Scorer]:
        """Returns the scorers of a sweep in the order of `names`; their scores are read from the cache where possible.

        Raises:
          UserError: a scorer cannot be loaded.
        """
        return [cached(self(name), self._cache) for name in names]

    def _load(self, name: str, parents: tuple[str, ...]) -> Scorer:
        """Returns the scorer `name`; `parents` are the ensembles that contain it, the outermost first."""
        if name in parents:
            raise UserError(f"config.scorers.{name}: is a member of itself ({' -> '.join((*parents, name))})")
        definition = self._definitions.get(name)
        if definition is not None and "members" in definition:
            # An ensemble is not stored in _LOADED: only its members take time to load, and they are stored there.
            return self._load_defined(name, definition, parents)
        # Toy weights depend on the run directory; all others are the same for every run of the process.
        toy_folder = str(self._workdir) if "toy:" in f"{name} {definition}" else ""
        key = (name, json.dumps(definition, sort_keys=True), toy_folder, self._mesh)
        if key not in _LOADED:
            if definition is None:
                _LOADED[key] = self._load_undefined(name)
            else:
                _LOADED[key] = self._load_defined(name, definition, parents)
        return _LOADED[key]

    def _load_undefined(self, name: str) -> Scorer:
        """Returns the scorer `name`, which is not a key of `config.scorers`; an error names the nearest scorer.

        A word alone is not looked for on the hub, where a misspelt name would cost minutes of retries.
        """
        known = [*_EMBEDDED, *self._definitions]
        nearest = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}."
        if name not in _EMBEDDED and not re.search("[:/]", name) and not Path(name).exists():
            raise UserError(f"{name}: no such scorer: {meant} Ids on the Hugging Face hub have the form OWNER/NAME")
        path_or_id = checkpoint_directory(name, self._workdir) if name.startswith("toy:") else name
        try:
            return loading.load_scorer(path_or_id, mesh=self._mesh)
        except UserError as error:
            if not nearest:
                raise
            raise UserError(f"{name}: {meant} ({error})") from error

    def _load_defined(self, name: str, definition: JsonObject, parents: tuple[str, ...]) -> Scorer:
        """Returns the scorer that `config.scorers` defines under `name`; for `parents` see `_load`."""
        from icet_jax.scorers.load import load_defined

        definition = dict(definition)
        if "checkpoint" in definition:
            definition["checkpoint"] = checkpoint_directory(definition["checkpoint"], self._workdir)
        if str(definition.get("endpoint", "")).startswith("toy:"):
            from icet_jax.miniatures.service import chat

            return chat(definition)
        resolve = lambda member: self._load(member, (*parents, name))  # noqa: E731
        return load_defined(name, definition, mesh=self._mesh, resolve=resolve)
