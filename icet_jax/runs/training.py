"""The training loop: batch -> algorithm's step -> log -> checkpoint, from wherever the last process stopped."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from ml_collections import ConfigDict

from icet_jax.api import VLM
from icet_jax.checkpoints.run_state import RunState
from icet_jax.data.batches import Batches
from icet_jax.data.records import Example
from icet_jax.evaluation import batching
from icet_jax.lppo.metrics import require_finite
from icet_jax.lppo.settings import Settings
from icet_jax.lppo.state import TrainState, init_state
from icet_jax.models.llama import init_lora
from icet_jax.runs.algorithms import Algorithm, Lppo, Lsft
from icet_jax.runs.metrics_log import MetricsLog
from icet_jax.runs.progress import Progress
from icet_jax.runs.reward import RewardByKind

# What the progress line shows, where the algorithm reports it.
_SHOWN = {
    "kl": "objective/kl",
    "reward": "objective/scores",
    "asr": "objective/asr_refusal_keywords",
    "loss": "loss/total_avg",
}
# The stream of the run key that initialises adapters; iterations count up from 0 and never get here.
_INIT_STREAM = 2**32 - 3


def train(
    config: ConfigDict, workdir: Path, vlm: VLM, examples: Sequence[Example], reward: RewardByKind
) -> tuple[TrainState, Settings]:
    """Trains to the last iteration; returns the final state and what it was trained with.

    Resumes from the last complete checkpoint in `workdir`. A run that was killed ends with the same bits as one that
    was not: rows, exits, samples and permutations depend on (seed, iteration) alone.

    Args:
      config: checked.
      workdir: claimed by this config.
      vlm: the model before training; its weights stay as they are.
      examples: the training rows.
      reward: scores responses (L-PPO).

    Raises:
      UserError: the mixture asks for rows that are not there, a prompt does not fit, an image is broken, or the loss is
        not finite (the last good checkpoint stays).
    """
    algorithm: Algorithm = Lppo(config, vlm, reward) if config.algorithm == "lppo" else Lsft(config, vlm)
    state = initial_state(config, vlm, algorithm.settings)
    batches = Batches(examples, mixture=config.data.mixture, batch_size=config.data.batch_size, seed=config.seed)
    per_row = max(len(example.images) for example in examples)

    def prepare(index: int) -> batching.PromptBatch:
        rows = batches.batch(index)
        return batching.prepare(
            vlm, rows, range(len(rows)), batch_size=len(rows), per_row=per_row, length=config.data.max_prompt_tokens
        )

    checkpoints = RunState(workdir / "checkpoints", keep=config.checkpoint.keep)
    try:
        restored = checkpoints.restore(like=state)
        state = state if restored is None else restored[1]
        if int(state.iteration) < algorithm.iterations:
            log = MetricsLog(workdir, config, step=int(state.iteration))
            try:
                state = _iterate(config, algorithm, state, prepare, checkpoints, log)
            finally:
                log.close()
    finally:
        checkpoints.close()
    return state, algorithm.settings


def initial_state(config: ConfigDict, vlm: VLM, settings: Settings) -> TrainState:
    """The state before the first iteration: fresh adapters (LoRA), or masters of the language model (rank 0)."""
    lora = None
    if config.lora.rank:
        key = jax.random.fold_in(jax.random.key(config.seed), _INIT_STREAM)
        lora = init_lora(
            vlm.config.text, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets, key=key
        )
    return init_state(
        vlm.params,
        lora,
        hidden_size=vlm.config.text.hidden_size,
        optimizer=settings.optimizer,
        kl_coef=config.lppo.kl_coef,
    )


def _iterate(
    config: ConfigDict,
    algorithm: Algorithm,
    state: TrainState,
    prepare: Callable[[int], batching.PromptBatch],
    checkpoints: RunState,
    log: MetricsLog,
) -> TrainState:
    """Every iteration that `state` has not had yet; the host opens and tokenises one batch ahead of the device."""
    start, total = int(state.iteration), algorithm.iterations
    with ThreadPoolExecutor(1) as background, Progress(config.algorithm, total, start=start) as progress:
        batch = prepare(start)
        algorithm.compile(state, batch)
        progress.restart_clock()
        for finished in range(start + 1, total + 1):
            coming = background.submit(prepare, finished) if finished < total else None
            state, row = algorithm.step(state, batch)
            require_finite(row, finished)
            last = finished == total
            if last or finished % config.log.every == 0:
                log.write(finished, row)
            if last or finished % config.checkpoint.every == 0:
                checkpoints.save(finished, state, {})
            progress.advance({name: row[metric] for name, metric in _SHOWN.items() if metric in row})
            if coming is not None:
                batch = coming.result()
    return state
