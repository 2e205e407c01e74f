"""Loads vision-language models of every family from HF checkpoints."""

import functools
from pathlib import Path

from jax.sharding import Mesh

from icet_jax.checkpoints.hf_config import read_hf_config
from icet_jax.checkpoints.hf_import import Checkpoint, abstract_params, load_network
from icet_jax.models import checkpoint_config, family_of
from icet_jax.models.adapters import read_adapter


def load_vlm(
    directory: str | Path, *, dtype: str = "float32", param_dtype: str | None = None, mesh: Mesh | None = None,
    remat: str = "none", adapter: str | Path | None = None, exit_rule: str | None = None, capture: str | None = None,
) -> Checkpoint:  # fmt: skip
    """Loads a vision-language model of any family from a checkpoint that transformers 4.46 to 5.x can read.

    Args:
      directory: directory with config.json and safetensors weights, in one file or in shards.
      dtype: compute dtype, "float32" or "bfloat16".
      param_dtype: dtype of the stored parameters; `dtype` if None. Full fine-tuning in bfloat16 needs "float32".
      mesh: mesh over which the parameters are split (`icet_jax.parallel.sharding.RULES`); None for the default device.
      remat: activations that are stored for the backward pass, see `icet_jax.nn.layers.REMAT_POLICIES`.
      adapter: PEFT directory of a LoRA adapter to start from. It is merged in float32 while the weights are read, and
        also returned as `Checkpoint.adapter`.
      exit_rule, capture: options of Llama 3.2 Vision, see `icet_jax.models.vlm_config`.

    Raises:
      UserError: the config is not supported; files are missing, corrupt or truncated; keys are missing, unexpected,
        duplicate or of a wrong shape or dtype (all are listed).
    """
    directory = Path(directory)
    values = read_hf_config(directory)
    config = checkpoint_config(directory, values, exit_rule=exit_rule, capture=capture)
    family = family_of(config)
    table = family.table(config)
    build_network = functools.partial(family.network, config, remat=remat)
    start = None if adapter is None else read_adapter(adapter, config)
    dtypes = {"dtype": dtype, "param_dtype": param_dtype or dtype}
    graphdef, params = load_network(directory, build_network, table, **dtypes, mesh=mesh, adapter=start)
    return Checkpoint(graphdef, params, config, values, directory, start)


def load_shapes(directory: str | Path, *, adapter: str | Path | None = None) -> Checkpoint:
    """Returns a checkpoint whose `params` are shapes in place of weights, which are not read.

    `models.saving.save_vlm` copies such a checkpoint tensor by tensor, if `trained` is ().

    Args:
      directory: directory with config.json and safetensors weights.
      adapter: PEFT directory of a LoRA, which becomes `Checkpoint.adapter`; None for none.

    Raises:
      UserError: the config is not supported, or the adapter is broken.
    """
    directory = Path(directory)
    values = read_hf_config(directory)
    config = checkpoint_config(directory, values)
    start = None if adapter is None else read_adapter(adapter, config)
    build_network = functools.partial(family_of(config).network, config)
    graphdef, shapes = abstract_params(build_network, "float32", "float32")
    return Checkpoint(graphdef, shapes, config, values, directory, start)
