"""`--mode=export` writes a run's trained model as a checkpoint in the Hugging Face layout, a PEFT adapter, or both."""

import argparse
import contextlib
import functools
import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from icet_jax.algorithms.forward import with_policy
from icet_jax.algorithms.settings import from_config
from icet_jax.checkpoints.folder import ADAPTER
from icet_jax.errors import UserError
from icet_jax.models import adapters
from icet_jax.models.adapter_export import save_adapter
from icet_jax.models.as_written import adapted_params, merged_params
from icet_jax.models.saving import save_vlm
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import POLICY_ROOT
from icet_jax.parallel.distributed import agree, on_first
from icet_jax.report.loading import EXPORT_CHECK
from icet_jax.runs import common, model_card, run_dir, run_lock
from icet_jax.training.loop import best_state, newest_state, open_checkpoints
from icet_jax.vlm import VLM

# {form of export: a file that exists only if an export of this form is complete}.
_MARKER_FILES = {"full": "config.json", "adapter": adapters.CONFIG}


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Writes the model of the run in `workdir`, or one per seed, from its newest (or best) checkpoint; returns 0.

    Args:
      config: unused; the config.json in the run directory is read instead.
      workdir: the run directory.
      options: `out`, the target folder; `workdir`/hf by default (with several seeds: `out`/seed_K or
        workdir/seed_K/hf).

    Raises:
      UserError: there is no run directory, nothing is trained yet, the target cannot be written, or a run is currently
        writing into the run directory that contains the target.
    """
    if workdir is None:
        raise UserError("--mode=export needs --workdir, the run directory whose model is exported")
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir={workdir}: no run (config.json) is there; give the folder of a run")
    config = run_dir.read_config(workdir / "config.json")
    if jax.device_count() == 1:
        config.mesh.update(data=-1, fsdp=1, tensor=1)  # the stored mesh belongs to the machine that trained
    seeds = [int(seed) for seed in config.seeds]
    runs = [workdir / f"seed_{seed}" for seed in seeds] or [workdir]
    with contextlib.ExitStack() as stack:
        for folder in runs:
            out = folder / "hf"
            if options.out is not None:
                out = options.out / folder.name if seeds else options.out
            else:
                on_first(functools.partial(_lock, stack, folder))
            export(config, folder, out)
    return 0


def _lock(stack: contextlib.ExitStack, workdir: Path) -> None:
    """Keeps runs from writing into `workdir` until `stack` ends."""
    stack.enter_context(run_lock.locked(workdir, "give --out, a folder elsewhere"))


def check_form(config: ConfigDict) -> None:
    """Raises a `UserError` if the config asks for the export of an adapter although the run trains every weight."""
    if config.export.form != "full" and not config.lora.rank:
        raise UserError(
            f"config.export.form={config.export.form} needs LoRA (config.lora.rank above 0): full fine-tuning has no "
            "adapter; use full"
        )


def export(config: ConfigDict, workdir: Path, out: Path) -> None:
    """Restores the newest checkpoint of one run, or the best if the config asks for it, and writes its model to `out`.

    Raises:
      UserError: see `run`.
    """
    check_form(config)
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir}: has no checkpoints to export; run --mode=align first")
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
    for folder in write_exports(config, vlm, state.trainable, settings.lora_scale, workdir, out, again=True):
        print(
            f"{folder}: the model after iteration {int(state.iteration)} of {config[config.algorithm].iterations}",
            file=sys.stderr,
        )


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
                source_dir=vlm.directory, trained=_trained(lora),
                max_shard_bytes=int(config.export.shard_gigabytes * 1e9),
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
            vlm.config, vlm.params, params, lora=lora, trained=_trained(lora), source_dir=directory, start=start,
            donate=True,
        )  # fmt: skip
    return vlm.with_weights(exported)


def _trained(lora: Lora | None) -> tuple[str, ...]:
    """Returns the parts of the model whose weights training changed directly: the decoder; none if it trained LoRA."""
    return (POLICY_ROOT,) if lora is None else ()


def _base_model(config: ConfigDict, vlm: VLM) -> str:
    """Returns the model that PEFT must load before the adapter: a hub id if the config names one, else its folder."""
    spec: str = config.model.checkpoint
    return spec if ":" not in spec and not Path(spec).expanduser().is_dir() else str(vlm.directory)
