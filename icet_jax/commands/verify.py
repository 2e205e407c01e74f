"""`--mode=verify` checks whether a checkpoint gives the same results here as in transformers.

It compares token ids, pixels, every hidden state of the image encoder, and logits and greedy tokens at several exits,
in float32 on both sides (in bfloat16 with `--config.model.dtype=bfloat16`). This package computes all rows as one
padded batch, transformers one row at a time. The comparison needs torch.

Rounding alone makes two correct programs differ, and some weights magnify it. Both are therefore compared with a third
result, the *yardstick*: transformers' model in float64 (in float32 if bfloat16 is compared). The error of transformers
is its largest difference from the yardstick. This package may differ from the yardstick by `ERROR_FACTOR` times that
error, or by a small multiple of the dtype's own precision (`TOLERANCE`) if that is larger. For logits the error of
transformers is the largest over all exits, because one exit is a small sample.

Computing the yardstick needs memory for the weights in float64, 8 bytes per parameter.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from icet_jax.checkpoints.source import local_directory
from icet_jax.commands.ask import parse_exits
from icet_jax.config import require
from icet_jax.errors import UserError
from icet_jax.media.tokenizer import has_tokenizer
from icet_jax.models.base import reference
from icet_jax.models.base.processor import Inputs
from icet_jax.runs import loading, shipped
from icet_jax.runs.sources import checkpoint_directory
from icet_jax.vlm import VLM

NEW_TOKENS = 32
ERROR_FACTOR = 4
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
"""Difference that is always allowed, by the compared dtype: a multiple of the standard deviation of the values."""


_Image = Image.Image | str | Path


@dataclasses.dataclass(frozen=True)
class Check:
    """Holds the result of one comparison, which is a line of the table.

    Attributes:
      what: what was compared.
      found: difference between this package and transformers, as text.
      allowed: limit of the difference.
      passed: whether the difference is within the limit.
    """

    what: str
    found: str
    allowed: str
    passed: bool


@dataclasses.dataclass(frozen=True)
class Answers:
    """Holds what one side, this package or transformers, computes for the compared inputs.

    Attributes:
      hidden: hidden states of the image encoder [X, I, P, D]: X states (one more than exits), I images of all rows, P
        positions, width D.
      logits: {exit: float32 [B, T, V]}: B rows, T positions, V tokens.
      tokens: {exit: greedy tokens [B, 32]}, padded after the end of the answer.
    """

    hidden: np.ndarray
    logits: dict[int, np.ndarray]
    tokens: dict[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Expected(Answers):
    """Holds the results of transformers: the yardstick's hidden states and logits, and greedy tokens of float32.

    Attributes:
      hidden_error: largest difference between each hidden state in the compared dtype and in the yardstick, [X].
      logits_error: {exit: largest difference between the logits in the compared dtype and in the yardstick}.
      gaps: {exit: float32 [B, 32]}, the difference of the two largest logits from which each token was chosen.
    """

    hidden_error: np.ndarray
    logits_error: dict[int, float]
    gaps: dict[int, np.ndarray]


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Compares the checkpoint with transformers and prints the table; returns 0 if everything agrees, else 1.

    Args:
      config: its `model.checkpoint` is compared, in its `model.dtype`.
      workdir: directory for toy weights.
      options: `exits` to compare, and `image` and `prompt` of one more row beside the built-in ones.

    Raises:
      UserError: torch is not installed, or the checkpoint cannot be loaded.
    """
    require(config, "model.checkpoint")
    if config.model.adapter is not None:
        raise UserError("--mode=verify compares whole checkpoints: export the model with its adapter, and give that")
    directory = checkpoint_directory(config.model.checkpoint, workdir)
    images = [shipped.example(path) for path in options.image]
    checks = verify(
        directory, options.exits, images=images, prompt=options.prompt, revision=config.model.revision,
        exit_rule=config.model.exit_rule, dtype=config.model.dtype,
    )  # fmt: skip
    print(table(checks))
    failed = [check.what for check in checks if not check.passed]
    print(f"FAILED: {', '.join(failed)}" if failed else f"{directory} agrees with transformers")
    return 1 if failed else 0


def verify(
    path_or_id: str | Path,
    exits: str | None = None,
    *,
    images: Sequence[str | Path] = (),
    prompt: str | None = None,
    revision: str | None = None,
    exit_rule: str | None = None,
    dtype: str = "float32",
) -> list[Check]:
    """Compares a checkpoint with transformers and returns the checks, which `table` prints.

    Args:
      path_or_id: a checkpoint directory or hub id.
      exits: "all", or numbers such as "1,12,23"; None means five evenly spaced exits and the default exit.
      images: images of one more row beside the built-in ones.
      prompt: prompt of that row.
      revision: revision of a hub id.
      exit_rule: for Llama 3.2 Vision, see `icet_jax.load`.
      dtype: dtype of weights and activations on both sides, "float32" or "bfloat16".

    Raises:
      UserError: torch is not installed, or the checkpoint cannot be loaded.
    """
    _require_torch()
    directory = local_directory(checkpoint_directory(str(path_or_id)), revision)
    with jax.default_matmul_precision("highest"):
        capture = reference.transformers_capture(directory)
        vlm = loading.load(directory, dtype, capture=capture, exit_rule=exit_rule)
        layers = parse_exits(exits, vlm.num_exits, vlm.default_exit)
        rows, inputs, checks = _compare_inputs(vlm, *_build_rows(images, prompt))
        ours = _compute_here(vlm, inputs, layers)
        vlm = vlm.with_weights(nnx.State({}))  # frees the weights: the yardstick needs the memory
    if capture is not None:
        checks.append(Check("captured intermediates", f"each block's {capture}, as this transformers has it", "", True))
    expected = _compute_in_transformers(vlm, rows, layers, dtype)
    # Here images of any size may be padded further than in transformers.
    ours = dataclasses.replace(ours, hidden=ours.hidden[:, :, : expected.hidden.shape[2]])
    return checks + compare(ours, expected, inputs["attention_mask"] == 1, TOLERANCE[dtype])


def compare(ours: Answers, theirs: Expected, mask: np.ndarray, tolerance: float) -> list[Check]:
    """Returns the checks of hidden states, logits and greedy tokens.

    Where the two largest logits of transformers differ by less than twice the allowed difference, either token may be
    the likelier one.

    Args:
      ours: results of this package.
      theirs: results of transformers.
      mask: bool [B, T], True at positions that are not padding.
      tolerance: difference that is always allowed, relative to the standard deviation of the values (at least 1).
    """
    states = zip(ours.hidden, theirs.hidden, theirs.hidden_error.tolist(), strict=True)
    what = f"hidden states 0..{len(theirs.hidden) - 1}"
    hidden_checks = [
        _check_close(f"{what} (worst: {i})", got, expected, _limit(expected, error, tolerance))
        for i, (got, expected, error) in enumerate(states)
    ]
    checks = [max(hidden_checks, key=lambda check_and_ratio: check_and_ratio[1])[0]]
    ties = {}
    error = max(theirs.logits_error.values(), default=0.0)
    for layer, expected in theirs.logits.items():
        got, expected = ours.logits[layer][mask], expected[mask]
        limit = _limit(expected, error, tolerance)
        ties[layer] = 2 * limit
        checks.append(_check_close(f"logits, exit {layer}", got, expected, limit)[0])
        checks.append(_check_likeliest(f"likeliest token, exit {layer}", got, expected, ties[layer]))
    for layer, tokens in theirs.tokens.items():
        what, is_clear = f"{NEW_TOKENS} greedy tokens, exit {layer}", theirs.gaps[layer] > ties[layer]
        checks.append(_check_tokens(what, ours.tokens[layer], tokens, is_clear))
    return checks


def _limit(expected: np.ndarray, error: float, tolerance: float) -> float:
    """Returns the largest allowed difference from the values `expected`.

    Args:
      expected: values of the yardstick.
      error: largest difference of transformers from them, in the compared dtype.
      tolerance: see `compare`.
    """
    return max(tolerance * max(1.0, float(expected.std())), ERROR_FACTOR * error)


def _check_close(what: str, got: np.ndarray, expected: np.ndarray, limit: float) -> tuple[Check, float]:
    """Returns (check that no value differs by more than `limit`, largest difference divided by `limit`)."""
    difference = float(np.abs(got - expected).max())
    return Check(what, f"{difference:.1e}", f"{limit:.1e}", difference <= limit), difference / limit


def _check_equal(what: str, got: np.ndarray, expected: np.ndarray) -> Check:
    """Returns the check that shapes and values are identical."""
    if got.shape != expected.shape:
        return Check(what, f"shape {got.shape}, not {expected.shape}", "0", False)
    difference = float(np.abs(got.astype(np.float64) - expected).max(initial=0))
    return Check(what, f"{difference:g}", "0", difference == 0)


def _check_likeliest(what: str, got: np.ndarray, expected: np.ndarray, tie: float) -> Check:
    """Returns the check that the largest logit belongs to the same token on both sides, wherever the two largest
    expected logits differ by more than `tie`."""
    top_two = np.partition(expected, -2, axis=-1)[..., -2:]
    is_clear = top_two[..., 1] - top_two[..., 0] > tie
    share = float((got.argmax(-1) == expected.argmax(-1))[is_clear].mean()) if is_clear.any() else 1.0
    return Check(what, f"{share:.2%} equal", "100%", share == 1)


def _check_tokens(what: str, got: np.ndarray, expected: np.ndarray, is_clear: np.ndarray) -> Check:
    """Returns the check that the tokens of each row, [B, 32], are identical up to the first near tie.

    `is_clear` (bool [B, 32]) is False where the two largest logits were nearly equal. A row may differ from such a
    token on, because all later tokens depend on it.
    """
    for row in range(len(expected)):
        differing = np.flatnonzero(got[row] != expected[row])
        if len(differing) and is_clear[row, differing[0]]:
            return Check(what, f"row {row} differs at token {differing[0]}", "identical", False)
    return Check(what, "identical", "identical", True)


def table(checks: Sequence[Check]) -> str:
    """Returns the checks as a text table: what was compared, the difference, the limit, and "ok" or "FAIL"."""
    rows = [("", "found", "allowed", ""), *((c.what, c.found, c.allowed, "ok" if c.passed else "FAIL") for c in checks)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError("--mode=verify compares with torch, which is missing: pip install torch") from error


def _build_rows(
    user_images: Sequence[str | Path], user_prompt: str | None
) -> tuple[list[list[_Image]], list[str]]:  # fmt: skip
    """Returns the images and the prompt of each compared row: three built-in rows with one, no and two images (noise of
    unusual sizes), and a fourth with the user's images and prompt if there are any."""
    generator = np.random.default_rng(0)
    sizes = ((97, 61), (64, 64), (33, 150))
    noise = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    images: list[list[_Image]] = [[noise[0]], [], [noise[1], noise[2]]]
    prompts = ["What is in this picture?", "Hello, how are you today?", "Which of the two is larger, and why?"]
    if user_prompt or user_images:
        images.append(list(user_images))
        prompts.append(user_prompt or prompts[0])
    return images, prompts


def _compare_inputs(
    vlm: VLM, images: list[list[_Image]], prompts: list[str]
) -> tuple[list[Inputs], Inputs, list[Check]]:
    """Compares the arrays of transformers' processor with those of this package's processor.

    Returns transformers' arrays of each row, those of all rows as one padded batch, and the checks. If the checkpoint
    has no tokenizer, nothing is compared and token ids and pixels are random.
    """
    if not has_tokenizer(vlm.directory):
        noise = np.random.default_rng(0)
        vocabulary = np.setdiff1d(np.arange(vlm.vocab_size), [*vlm.suppress_ids, *vlm.eos_ids])
        rows = [reference.random_row(vlm.config, vocabulary, len(row), 9 + i, noise) for i, row in enumerate(images)]
        skipped = Check("token ids, pixels", "skipped: no tokenizer files", "", True)
        return rows, reference.join(vlm.config, rows, vlm.pad_id), [skipped]
    ours, processor = vlm.processor(images=images, prompts=prompts), reference.hf_processor(vlm.directory, vlm.config)
    pairs = zip(images, prompts, strict=True)
    rows = [reference.hf_row(processor, vlm.processor.template, row, prompt) for row, prompt in pairs]
    theirs = reference.join(vlm.config, rows, vlm.processor.tokenizer.pad_token_id)
    if set(ours) != set(theirs):
        return rows, theirs, [Check("inputs", ", ".join(sorted(ours)), ", ".join(sorted(theirs)), False)]
    names = {"input_ids": "token ids", "pixel_values": "pixels"}
    return (
        rows,
        theirs,
        [_check_equal(names.get(name, name.replace("_", " ")), ours[name], theirs[name]) for name in ours],
    )


def _compute_here(vlm: VLM, inputs: Inputs, exits: Sequence[int]) -> Answers:
    """Returns this package's results for one batch of rows."""
    encoded = vlm.encode(inputs)
    return Answers(
        hidden=np.asarray(vlm.hidden_states(inputs), np.float64),
        logits={layer: np.asarray(vlm.logits(inputs, layer, encoded=encoded)) for layer in exits},
        tokens={layer: vlm.generate(inputs, layer, NEW_TOKENS, encoded=encoded).tokens for layer in exits},
    )


def _compute_in_transformers(vlm: VLM, rows: Sequence[Inputs], exits: Sequence[int], dtype: str) -> Expected:
    """Returns transformers' results, computed row by row and put together as one padded batch.

    Args:
      vlm: the model, which may have no weights: transformers loads its files.
      rows: arrays of each row, see `reference.hf_row`.
      exits: exits of the logits and tokens.
      dtype: the compared dtype.
    """
    import torch
    from transformers import GenerationConfig

    model = _load_hf(vlm, torch.float32)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=list(vlm.eos_ids), pad_token_id=vlm.pad_id,
        suppress_tokens=list(vlm.suppress_ids), output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    tensors = [{name: torch.from_numpy(array) for name, array in row.items()} for row in rows]
    generated: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    with torch.no_grad():
        for layer in exits:
            with reference.at_exit(model, vlm.config, layer):
                tokens_and_gaps = [_hf_greedy(model, row, vlm.pad_id) for row in tensors]
            generated[layer] = (
                np.stack([tokens for tokens, _ in tokens_and_gaps]),
                np.stack([gaps for _, gaps in tokens_and_gaps]),
            )
        in_float32 = _hf_forward(model, vlm, tensors, exits)
        if dtype == "float32":
            compared, yardstick = in_float32, _hf_forward(model.double(), vlm, tensors, exits)
        else:
            # Loaded again: model.bfloat16() would also round the frequencies of the rotary embedding.
            compared, yardstick = _hf_forward(_load_hf(vlm, torch.bfloat16), vlm, tensors, exits), in_float32
    (hidden, logits), (compared_hidden, compared_logits) = yardstick, compared
    return Expected(
        hidden=hidden,
        logits=logits,
        tokens={layer: tokens for layer, (tokens, _) in generated.items()},
        hidden_error=np.abs(hidden - compared_hidden).max(axis=(1, 2, 3)),
        logits_error={layer: float(np.abs(logits[layer] - compared_logits[layer]).max()) for layer in exits},
        gaps={layer: gaps for layer, (_, gaps) in generated.items()},
    )


def _load_hf(vlm: VLM, dtype: Any) -> Any:
    """Returns transformers' model of the checkpoint with weights of a torch dtype.

    Its attention is sdpa, which computes in the dtype of the model; the eager one has a softmax in float32.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForImageTextToText.from_pretrained(vlm.directory, dtype=dtype, attn_implementation="sdpa").eval()


def _hf_forward(
    model: Any, vlm: VLM, rows: Sequence[dict[str, Any]], exits: Sequence[int]
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Runs transformers' model on each row (torch tensors by name), in the dtype of its weights.

    Returns (hidden states of the image encoder [X, I, P, D], {exit: logits [B, T, V], left-padded with 0}), in float64.
    """
    rows = [{name: t.to(model.dtype) if t.is_floating_point() else t for name, t in row.items()} for row in rows]
    with reference.norms_in_own_dtype(model):
        encoded = [reference.encoder_states(model, vlm.config, row) for row in rows if "pixel_values" in row]
        hidden = [
            reference.concatenate_padded([state.double().numpy() for state in states])
            for states in zip(*encoded, strict=True)
        ]
        length = max(row["input_ids"].shape[1] for row in rows)
        logits = {}
        for layer in exits:
            with reference.at_exit(model, vlm.config, layer):
                row_logits = [model(**row).logits[0].double().numpy() for row in rows]
            logits[layer] = np.stack([np.pad(row, ((length - len(row), 0), (0, 0))) for row in row_logits])
    return np.stack(hidden), logits


def _hf_greedy(model: Any, row: dict[str, Any], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the greedy tokens [32] of one row, and the difference of the two largest logits at each of them [32];
    after the end of the answer they are `pad_id` and infinite."""
    import torch

    out = model.generate(**row)
    tokens = out.sequences[0, row["input_ids"].shape[1] :].numpy()
    top_two = torch.stack(out.scores, dim=1)[0].topk(2, dim=-1).values
    padding = (0, NEW_TOKENS - len(tokens))
    gaps = np.pad((top_two[..., 0] - top_two[..., 1]).numpy(), padding, constant_values=np.inf)
    return np.pad(tokens, padding, constant_values=pad_id), gaps
