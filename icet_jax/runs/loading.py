"""Loads models and scorers by directory, hub id or "organism:NAME"."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from icet_jax.checkpoints.source import local_directory
from icet_jax.config.names import DTYPES
from icet_jax.errors import UserError
from icet_jax.models.loading import load_vlm
from icet_jax.scorers.base import Scorer
from icet_jax.vlm import VLM


def load(
    path_or_id: str | Path,
    dtype: DTypeLike = "float32",
    mesh: jax.sharding.Mesh | None = None,
    *,
    param_dtype: DTypeLike | None = None,
    remat: str = "none",
    revision: str | None = None,
    adapter: str | Path | None = None,
    exit_rule: str | None = None,
    capture: str | None = None,
    template: str | None = None,
) -> VLM:
    """Loads a vision-language model with its weights; tokenizer and image processor are loaded on first use.

    Args:
      path_or_id: a checkpoint directory in the Hugging Face layout, a hub id, or "organism:vlm", which is part of this
        package.
      dtype: dtype of the computation, "float32" or "bfloat16".
      mesh: devices over which the weights are split (`icet_jax.parallel.mesh.make_mesh`); None is the default device.
      param_dtype: dtype of the stored weights; `dtype` by default.
      remat: which intermediate results are kept for a backward pass instead of being computed again: "none" (all of
        them), "dots" (matrix products), "full" (only the inputs of layers).
      revision: branch, tag or commit of a hub id; None is its default branch.
      adapter: directory or hub id of a PEFT LoRA, merged into the language model in float32 while it is loaded.
      exit_rule: for Llama 3.2 Vision, what exit l feeds the projector: "E1", "E2" or "E5"
        (see `icet_jax.models.mllama.network.EXIT_DEFINITIONS`); None means "E1".
      capture: for Llama 3.2 Vision, which intermediate states its projector takes: each block's "input", as the model
        was trained, or its "output", as transformers since 4.56 reads them; None means "input".
      template: chat template instead of the checkpoint's own, "vicuna_v1" or "llava_v1" (`config.data.template`).

    Raises:
      UserError: the checkpoint does not exist, is not supported, or is broken.
    """
    dtype_name = _dtype_name(dtype)
    param_dtype_name = None if param_dtype is None else _dtype_name(param_dtype)
    directory = local_directory(_organism_directory(path_or_id), revision)
    checkpoint = load_vlm(
        directory,
        dtype=dtype_name,
        param_dtype=param_dtype_name,
        mesh=mesh,
        remat=remat,
        adapter=None if adapter is None else local_directory(adapter),
        exit_rule=exit_rule,
        capture=capture,
    )
    return VLM(checkpoint, mesh, template)


def load_scorer(
    path_or_id: str | Path,
    kind: str | None = None,
    template: Callable[[str, str], str] | str | None = None,
    **options: Any,
) -> Scorer:
    """Loads a scorer: a function of prompts (without chat template) and responses that returns {metric: `Scores`}.

    Args:
      path_or_id: "refusal_keywords", a checkpoint directory, a hub id, "organism:reward_model", or "organism:judge",
        the exact judge of the organism's world.
      kind: kind of scorer; None if the checkpoint's config says it.
      template: how a prompt and a response become the text that the scorer reads: a function of both, the name of a
        template, or None for the scorer's own template.
      options: `dtype`, `mesh`, `revision`, `batch_size` and the settings of this kind of scorer, see
        `icet_jax.scorers.load.load_scorer`.

    Raises:
      UserError: the scorer does not exist, or its files are broken.
    """
    if path_or_id == "organism:judge":
        from icet_jax.organism.scorer import WorldJudge

        return WorldJudge()
    from icet_jax.scorers.load import load_scorer as load_judge

    return load_judge(_organism_directory(path_or_id), kind=kind, template=template, **options)


def _organism_directory(path_or_id: str | Path) -> str | Path:
    """Returns the directory of an "organism:NAME"; other paths and ids are returned unchanged."""
    origin, _, name = str(path_or_id).partition(":")
    if origin != "organism" or not name:
        return path_or_id
    from icet_jax.organism import weights_directory

    return weights_directory(name)


def _dtype_name(dtype: DTypeLike) -> str:
    """Returns the name of a dtype; raises a `UserError` if the package does not compute in it."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise UserError(f"dtype: {name} given; use {' or '.join(DTYPES)}")
    return name
