"""`--mode=export` writes a run's trained model as a checkpoint in the Hugging Face layout, a PEFT adapter, or both.

With `--exit=l` it writes the whole model with exit l alone, for deployment: of a run, or of any checkpoint.
"""

import argparse
import contextlib
import functools
import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from icet_jax.algorithms.forward import replaced_roots, with_policy
from icet_jax.algorithms.settings import from_config
from icet_jax.checkpoints.folder import ADAPTER
from icet_jax.checkpoints.hf_import import Checkpoint
from icet_jax.checkpoints.source import local_directory
from icet_jax.config import trained_parts
from icet_jax.errors import UserError
from icet_jax.models import adapters, family_of
from icet_jax.models.adapter_export import save_adapter
from icet_jax.models.as_written import adapted_params, merged_params
from icet_jax.models.loading import load_shapes
from icet_jax.models.saving import save_vlm
from icet_jax.parallel.distributed import agree, on_first
from icet_jax.report.loading import EXPORT_CHECK
from icet_jax.runs import common, model_card, run_dir, run_lock, sources
from icet_jax.training.loop import best_state, newest_state, open_checkpoints
from icet_jax.vlm import VLM

# {form of export: a file that exists only if an export of this form is complete}.
_MARKER_FILES = {"full": "config.json", "adapter": adapters.CONFIG}


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Writes the model of the run in `workdir`, or one per seed, from its newest (or best) checkpoint; returns 0.

    Args:
      config: names the checkpoint of which an exit is written; not used with a run directory, whose config.json is read
        instead.
      workdir: the run directory; None writes an exit of `config.model.checkpoint`.
      options: `out`, the target folder; `workdir`/hf by default, or `workdir`/hf_exit_L (with several seeds:
        `out`/seed_K or workdir/seed_K/hf). `exit`, the only exit to write, or None. `checkpoint`, the value of
        --checkpoint or None.

    Raises:
      UserError: there is no run directory, nothing is trained yet, the target cannot be written, or a run is currently
        writing into the run directory that contains the target; or there is no such exit, or the family cannot have
        files with one exit.
    """
    if options.exit is not None and options.checkpoint is not None:
        if workdir is not None:
            raise UserError("--mode=export --exit: give --workdir (a run) or --checkpoint (any model), not both")
        export_exit_of_checkpoint(config, options.exit, options.out)
        return 0
    if workdir is None:
        other = " (or --checkpoint, with --exit)" if options.exit is None else " or --checkpoint"
        raise UserError(f"--mode=export needs --workdir, the run directory whose model is exported{other}")
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir={workdir}: no run (config.json) is there; give the folder of a run")
    config = run_dir.read_config(workdir / "config.json")
    if jax.device_count() == 1:
        config.mesh.update(data=-1, fsdp=1, tensor=1)  # the stored mesh belongs to the machine that trained
    seeds = [int(seed) for seed in config.seeds]
    runs = [workdir / f"seed_{seed}" for seed in seeds] or [workdir]
    with contextlib.ExitStack() as stack:
        for folder in runs:
            out = folder / ("hf" if options.exit is None else f"hf_exit_{options.exit}")
            if options.out is not None:
                out = options.out / folder.name if seeds else options.out
            else:
                on_first(functools.partial(_lock, stack, folder))
            export(config, folder, out, options.exit)
    return 0


def _lock(stack: contextlib.ExitStack, workdir: Path) -> None:
    """Keeps runs from writing into `workdir` until `stack` ends."""
    stack.enter_context(run_lock.locked(workdir, "give --out, a folder elsewhere"))


def check_form(config: ConfigDict) -> None:
    """Raises a `UserError` if the config asks for the export of an adapter although the run trains weights directly."""
    if config.export.form != "full" and "projector" in trained_parts(config):
        raise UserError(
            f"config.export.form={config.export.form}: an adapter does not hold the projector, which "
            f"config.{config.algorithm}.train={config[config.algorithm].train} trains; use full"
        )
    if config.export.form != "full" and not config.lora.rank:
        raise UserError(
            f"config.export.form={config.export.form} needs LoRA (config.lora.rank above 0): full fine-tuning has no "
            "adapter; use full"
        )


def export(config: ConfigDict, workdir: Path, out: Path, exit_layer: int | None = None) -> None:
    """Restores the newest checkpoint of one run, or the best if the config asks for it, and writes its model to `out`.

    Args:
      config: config of the run.
      workdir: run directory.
      out: folder of the full model; an adapter goes to `out`/adapter.
      exit_layer: the only exit of the written model, which then is a full model whatever `config.export.form` is; None
        writes what the config asks for.

    Raises:
      UserError: see `run`.
    """
    check_form(config)
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir}: has no checkpoints to export; run --mode=align first")
    if exit_layer is not None:  # before the weights are read
        _shapes_at_exit(config, workdir, exit_layer)
    vlm = common.load_model(config, workdir, record=False)
    settings = from_config(config, vlm.sampling(config.lppo.max_new_tokens, config.lppo.temperature))
    checkpoints = open_checkpoints(config, workdir)
    try:
        if not checkpoints.steps:
            raise UserError(f"{workdir}: has no complete checkpoint yet; let --mode=align go on")
        state, _ = newest_state(config, vlm, settings, checkpoints)
        if config.checkpoint.best is not None:
            state = best_state(state, checkpoints)
    finally:
        checkpoints.close()
    trained, iterations = (state.trainable, settings.lora_scale), config[config.algorithm].iterations
    if exit_layer is None:
        folders, what = write_exports(config, vlm, *trained, workdir, out, again=True), "the model"
    else:
        folders, what = [_write_exit(config, vlm, *trained, workdir, out, exit_layer)], _one_exit(exit_layer, vlm)
    for folder in folders:
        print(f"{folder}: {what} after iteration {int(state.iteration)} of {iterations}", file=sys.stderr)


def export_exit_of_checkpoint(config: ConfigDict, exit_layer: int, out: Path | None) -> None:
    """Writes a model with one exit alone from the files of `config.model`, without loading its weights into a model.

    Args:
      config: its `model` names the checkpoint and, optionally, an adapter to merge.
      exit_layer: the only exit of the written model.
      out: folder to write.

    Raises:
      UserError: see `run`.
    """
    if out is None:
        raise UserError("--mode=export --checkpoint --exit needs --out, the folder to write")
    checkpoint = _shapes_at_exit(config, None, exit_layer)
    model, merged = checkpoint.model, config.model.adapter
    card = model_card.text_of_exit(
        config.model.checkpoint, exit_layer, model.num_exits, model.default_exit, revision=config.model.revision,
        adapter=merged,
    )  # fmt: skip
    save_vlm(
        out, checkpoint.config, checkpoint.params, source_dir=checkpoint.directory, start=checkpoint.adapter,
        trained=(), texts={"README.md": card}, max_shard_bytes=_shard_bytes(config), exit_layer=exit_layer,
    )  # fmt: skip
    print(f"{out}: {_one_exit(exit_layer, model)} of {config.model.checkpoint}", file=sys.stderr)


def _shapes_at_exit(config: ConfigDict, workdir: Path | None, exit_layer: int) -> Checkpoint:
    """Returns the checkpoint of `config.model` without its weights; raises a `UserError` if there can be no files with
    this exit alone."""
    model = config.model
    directory = local_directory(sources.checkpoint_directory(model.checkpoint, workdir), model.revision)
    adapter = None if model.adapter is None else local_directory(model.adapter)
    checkpoint = load_shapes(directory, adapter=adapter)
    family_of(checkpoint.config).config_at_exit(checkpoint.config, exit_layer, "--exit")
    return checkpoint


def _write_exit(
    config: ConfigDict, vlm: VLM, trainable: dict[str, Any], lora_scale: float | None, workdir: Path, out: Path,
    exit_layer: int,
) -> Path:  # fmt: skip
    """Writes the trained model with one exit alone, adapters merged, and returns `out`; see `write_exports`."""
    params, lora = with_policy(vlm.params, trainable, lora_scale)
    if out == workdir / "hf":  # an earlier check does not apply to the new files
        on_first(functools.partial((workdir / EXPORT_CHECK).unlink, missing_ok=True))
    card = on_first(functools.partial(model_card.text, workdir, exit_layer=exit_layer))
    return save_vlm(
        out, vlm.config, params, lora=lora, start=vlm.adapter, texts={"README.md": card}, source_dir=vlm.directory,
        trained=_replaced(trainable, lora_scale), max_shard_bytes=_shard_bytes(config), exit_layer=exit_layer,
    )  # fmt: skip


def _one_exit(exit_layer: int, model: Any) -> str:
    """Returns what an export with one exit alone contains; `model` is the whole model, a `VLM` or its network."""
    return f"exit {exit_layer} of {model.num_exits} alone"


def _shard_bytes(config: ConfigDict) -> int:
    """Returns the largest size of a weight file."""
    return int(config.export.shard_gigabytes * 1e9)


def write_exports(
    config: ConfigDict, vlm: VLM, trainable: dict[str, Any], lora_scale: float | None, workdir: Path, out: Path, *,
    again: bool,
) -> list[Path]:  # fmt: skip
    """Writes the trained model as `config.export.form` says: merged weights, an adapter or both; returns the folders.

    Each folder also gets the value head, if there is one, and a model card.

    Args:
      config: config of the run.
      vlm: the model before training, with its start adapter; its weights are not read if adapters were trained.
      trainable: the trained parameters (`TrainState.trainable`).
      lora_scale: alpha / rank; None after full fine-tuning.
      workdir: run directory, from which the model card is written.
      out: folder of the full model; the adapter goes to `out`/adapter.
      again: whether an export that is already complete is replaced.

    Raises:
      UserError: a folder cannot be written.
    """
    params, lora = with_policy(vlm.params, trainable, lora_scale)
    head = trainable.get("value_head")
    folders = {"full": out} if config.export.form != "adapter" else {}
    if config.export.form != "full":
        folders["adapter"] = out / ADAPTER
    for form, folder in folders.items():
        if agree((folder / _MARKER_FILES[form]).is_file() and not again):
            continue
        if out == workdir / "hf":  # an earlier check does not apply to the new files
            on_first(functools.partial((workdir / EXPORT_CHECK).unlink, missing_ok=True))
        texts = {"README.md": on_first(functools.partial(model_card.text, workdir, form=form))}
        if form == "full":
            save_vlm(
                folder, vlm.config, params, lora=lora, start=vlm.adapter, value_head=head, texts=texts,
                source_dir=vlm.directory, trained=_replaced(trainable, lora_scale),
                max_shard_bytes=_shard_bytes(config),
            )  # fmt: skip
        elif lora is not None:
            save_adapter(
                folder, lora, vlm.config, base=_base_model(config, vlm), revision=config.model.revision,
                start=vlm.adapter, value_head=head, texts=texts,
            )  # fmt: skip
    return list(folders.values())


def as_exported(config: ConfigDict, vlm: VLM, trainable: dict[str, Any], lora_scale: float | None) -> VLM:
    """Returns the trained model with exactly the weights that loading its export will give.

    A run measures this model after training. It is the model in `workdir`/hf; if `config.export.form` is "adapter", it
    is the base model with the adapter merged into it. Weights of `vlm` that training has changed are deleted one by one
    to save memory, so `vlm` must not be used again.

    Args:
      config: config of the run.
      vlm: the model before training, with its start adapter.
      trainable: the trained parameters.
      lora_scale: alpha / rank; None after full fine-tuning.

    Raises:
      UserError: the model's files are missing or have changed.
    """
    params, lora = with_policy(vlm.params, trainable, lora_scale)
    directory, start = vlm.directory, vlm.adapter
    if config.export.form == "adapter" and lora is not None:
        exported = adapted_params(vlm.config, vlm.params, lora, source_dir=directory, start=start, donate=True)
    else:
        exported = merged_params(
            vlm.config, vlm.params, params, lora=lora, trained=_replaced(trainable, lora_scale), source_dir=directory,
            start=start, donate=True,
        )  # fmt: skip
    return vlm.with_weights(exported)


def _replaced(trainable: dict[str, Any], lora_scale: float | None) -> tuple[str, ...]:
    """Returns the parts of the model whose weights training changed directly: the decoder, the projector, or none."""
    return tuple(replaced_roots(trainable, lora_scale).values())


def _base_model(config: ConfigDict, vlm: VLM) -> str:
    """Returns the model that PEFT must load before the adapter: a hub id if the config names one, else its folder."""
    spec: str = config.model.checkpoint
    return spec if ":" not in spec and not Path(spec).expanduser().is_dir() else str(vlm.directory)
