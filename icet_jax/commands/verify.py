"""`--mode=verify` checks whether a checkpoint gives the same results here as in transformers.

It compares token ids, pixels, every hidden state of the image encoder, and logits and greedy tokens at several exits,
in float32 on both sides. Rows are one padded batch here and single in transformers. It needs torch.

Rounding alone makes two correct programs differ, and some weights magnify it. A difference is therefore allowed up to
the larger of two limits: `TOLERANCE` for values with a spread of about 1 (larger ones in proportion), and `SPREADS`
times the difference between transformers' own two attention implementations on the same inputs. For logits that is the
largest difference over all exits, because the decoder magnifies rounding and one exit is a small sample.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
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
TOLERANCE = 2e-5
SPREADS = 8
TIE = 5e-5  # logits closer than this (or than twice the allowed difference) may be in either order


@dataclasses.dataclass(frozen=True)
class Check:
    """Holds one line of the table."""

    what: str
    found: str
    allowed: str
    passed: bool


@dataclasses.dataclass(frozen=True)
class Answers:
    """Holds the results of one side for the same inputs.

    Attributes:
      hidden: [X, I, P, D], states of the image encoder.
      logits: {exit: float32 [B, T, V]}.
      tokens: {exit: [B, 32]}, padded after the end.
    """

    hidden: np.ndarray
    logits: dict[int, np.ndarray]
    tokens: dict[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Reference(Answers):
    """Holds the results of transformers (eager attention), and their uncertainty.

    Attributes:
      hidden_spread: [X], the largest difference from its other attention implementation (sdpa).
      logits_spread: {exit: the same at positions that are not padding}.
      gaps: {exit: float32 [B, 32]}, the gap between the two largest logits before each token.
    """

    hidden_spread: np.ndarray
    logits_spread: dict[int, float]
    gaps: dict[int, np.ndarray]


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Prints the table of `verify`; returns 0 if everything agrees, 1 if not.

    Args:
      config: its `model.checkpoint` is compared.
      workdir: directory for toy weights.
      options: `exits` to compare, and `image` and `prompt` of one more row.

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
        exit_rule=config.model.exit_rule,
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
) -> list[Check]:
    """Compares a checkpoint with transformers and returns the checks, which `table` prints.

    Args:
      path_or_id: a checkpoint directory or hub id.
      exits: "all", or numbers such as "1,12,23"; None means a few over the encoder and the default exit.
      images: images of one more row in addition to the built-in ones.
      prompt: prompt of that row.
      revision: revision of a hub id.
      exit_rule: for Llama 3.2 Vision, see `icet_jax.load`.

    Raises:
      UserError: torch is not installed, or the checkpoint cannot be loaded.
    """
    _require_torch()
    directory = local_directory(checkpoint_directory(str(path_or_id)), revision)
    with jax.default_matmul_precision("highest"):
        capture = reference.transformers_capture(directory)
        vlm = loading.load(directory, capture=capture, exit_rule=exit_rule)
        layers = parse_exits(exits, vlm.num_exits, vlm.default_exit)
        rows, inputs, checks = _inputs(vlm, *_questions(images, prompt))
        ours = _ours(vlm, inputs, layers)
    if capture is not None:
        checks.append(Check("captured intermediates", f"each block's {capture}, as this transformers has it", "", True))
    return checks + compare(ours, _theirs(vlm, rows, layers), inputs["attention_mask"] == 1)


def compare(ours: Answers, theirs: Reference, real: np.ndarray) -> list[Check]:
    """Returns the differences of hidden states, logits and tokens, each with its limit.

    Args:
      ours: results of this package.
      theirs: results of transformers.
      real: bool [B, T], True at positions that are not padding.
    """
    states = [
        _close(f"hidden states 0..{len(theirs.hidden) - 1} (worst: {i})", *pair)
        for i, pair in enumerate(zip(ours.hidden, theirs.hidden, theirs.hidden_spread.tolist(), strict=True))
    ]
    checks = [max(states, key=lambda state: state[1])[0]]
    ties = {}
    spread = max(theirs.logits_spread.values(), default=0.0)
    for layer, expected in theirs.logits.items():
        got, expected = ours.logits[layer][real], expected[real]
        ties[layer] = max(TIE, 2 * _allowed(expected, spread))
        checks.append(_close(f"logits, exit {layer}", got, expected, spread)[0])
        checks.append(_same_choice(f"likeliest token, exit {layer}", got, expected, ties[layer]))
    for layer, tokens in theirs.tokens.items():
        what, clear = f"{NEW_TOKENS} greedy tokens, exit {layer}", theirs.gaps[layer] > ties[layer]
        checks.append(_same_tokens(what, ours.tokens[layer], tokens, clear))
    return checks


def _allowed(expected: np.ndarray, spread: float) -> float:
    return max(TOLERANCE * max(1.0, float(expected.std())), SPREADS * spread)


def _close(what: str, got: np.ndarray, expected: np.ndarray, spread: float) -> tuple[Check, float]:
    """Returns the check, and its difference divided by the limit."""
    difference, allowed = float(np.abs(got - expected).max()), _allowed(expected, spread)
    return Check(what, f"{difference:.1e}", f"{allowed:.1e}", difference <= allowed), difference / allowed


def _equal(what: str, got: np.ndarray, expected: np.ndarray) -> Check:
    if got.shape != expected.shape:
        return Check(what, f"shape {got.shape}, not {expected.shape}", "0", False)
    difference = float(np.abs(got.astype(np.float64) - expected).max(initial=0))
    return Check(what, f"{difference:g}", "0", difference == 0)


def _same_choice(what: str, got: np.ndarray, expected: np.ndarray, tie: float) -> Check:
    """Compares the most likely token at every position where the two largest logits differ by more than `tie`."""
    top = np.partition(expected, -2, axis=-1)[..., -2:]
    clear = top[..., 1] - top[..., 0] > tie
    share = float((got.argmax(-1) == expected.argmax(-1))[clear].mean()) if clear.any() else 1.0
    return Check(what, f"{share:.2%} equal", "100%", share == 1)


def _same_tokens(what: str, got: np.ndarray, expected: np.ndarray, clear: np.ndarray) -> Check:
    """Compares rows up to their first difference, which must not be where the choice was `clear` (bool [B, 32])."""
    for row in range(len(expected)):
        wrong = np.flatnonzero(got[row] != expected[row])
        if len(wrong) and clear[row, wrong[0]]:
            return Check(what, f"row {row} differs at token {wrong[0]}", "identical", False)
    return Check(what, "identical", "identical", True)


def table(checks: Sequence[Check]) -> str:
    """Returns the checks as lines of text: what was compared, the difference, and the limit."""
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


def _questions(own: Sequence[str | Path], question: str | None) -> tuple[list[list[Any]], list[str]]:
    """Returns rows with one, no and two images (noise of unusual sizes), and the user's own row."""
    noise = np.random.default_rng(0)
    sizes = ((97, 61), (64, 64), (33, 150))
    pictures = [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    images: list[list[Any]] = [[pictures[0]], [], [pictures[1], pictures[2]]]
    prompts = ["What is in this picture?", "Hello, how are you today?", "Which of the two is larger, and why?"]
    if question or own:
        images.append(list(own))
        prompts.append(question or prompts[0])
    return images, prompts


def _inputs(vlm: VLM, images: list[list[Any]], prompts: list[str]) -> tuple[list[Inputs], Inputs, list[Check]]:
    """Returns each row from transformers' processor, all rows as one batch, and the comparison with this package's
    processor.

    If the checkpoint has no tokenizer, the rows have random token ids and pixels.
    """
    if not has_tokenizer(vlm.directory):
        noise = np.random.default_rng(0)
        allowed = np.setdiff1d(np.arange(vlm.vocab_size), [*vlm.suppress_ids, *vlm.eos_ids])
        rows = [reference.random_row(vlm.config, allowed, len(row), 9 + i, noise) for i, row in enumerate(images)]
        skipped = Check("token ids, pixels", "skipped: no tokenizer files", "", True)
        return rows, reference.join(vlm.config, rows, vlm.pad_id), [skipped]
    ours, processor = vlm.processor(images=images, prompts=prompts), reference.hf_processor(vlm.directory, vlm.config)
    pairs = zip(images, prompts, strict=True)
    rows = [reference.hf_row(processor, vlm.processor.template, row, prompt) for row, prompt in pairs]
    theirs = reference.join(vlm.config, rows, vlm.processor.tokenizer.pad_token_id)
    if set(ours) != set(theirs):
        return rows, theirs, [Check("inputs", ", ".join(sorted(ours)), ", ".join(sorted(theirs)), False)]
    names = {"input_ids": "token ids", "pixel_values": "pixels"}
    return rows, theirs, [_equal(names.get(name, name.replace("_", " ")), ours[name], theirs[name]) for name in ours]


def _ours(vlm: VLM, inputs: Inputs, exits: Sequence[int]) -> Answers:
    encoded = vlm.encode(inputs)
    return Answers(
        hidden=np.asarray(vlm.hidden_states(inputs)),
        logits={layer: np.asarray(vlm.logits(inputs, layer, encoded=encoded)) for layer in exits},
        tokens={layer: vlm.generate(inputs, layer, NEW_TOKENS, encoded=encoded).tokens for layer in exits},
    )


def _theirs(vlm: VLM, rows: Sequence[Inputs], exits: Sequence[int]) -> Reference:
    """Returns transformers' results for each row alone, in the layout of this package."""
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(vlm.directory, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=list(vlm.eos_ids), pad_token_id=vlm.pad_id,
        suppress_tokens=list(vlm.suppress_ids), output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    tensors = [{name: torch.from_numpy(array) for name, array in row.items()} for row in rows]
    generated: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        other_hidden, other_logits = _hf_forward(model, vlm, tensors, exits)
        model.set_attn_implementation("eager")
        hidden, logits = _hf_forward(model, vlm, tensors, exits)
        for layer in exits:
            with reference.at_exit(model, vlm.config, layer):
                tokens_and_gaps = [_hf_greedy(model, row, vlm.pad_id) for row in tensors]
            generated[layer] = (
                np.stack([tokens for tokens, _ in tokens_and_gaps]),
                np.stack([gaps for _, gaps in tokens_and_gaps]),
            )
    return Reference(
        hidden=hidden,
        logits=logits,
        tokens={layer: tokens for layer, (tokens, _) in generated.items()},
        hidden_spread=np.abs(hidden - other_hidden).max(axis=(1, 2, 3)),
        logits_spread={x: float(np.abs(logits[x] - other_logits[x]).max()) for x in exits},
        gaps={layer: gaps for layer, (_, gaps) in generated.items()},
    )


def _hf_forward(
    model: Any, vlm: VLM, rows: Sequence[dict[str, Any]], exits: Sequence[int]
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Returns hidden states [X, I, P, D] of the image encoder, and logits [B, T, V] at each exit, 0 at padding on the
    left."""
    encoded = [reference.encoder_states(model, vlm.config, row) for row in rows if "pixel_values" in row]
    hidden = [np.concatenate([state.numpy() for state in states]) for states in zip(*encoded, strict=True)]
    length = max(row["input_ids"].shape[1] for row in rows)
    logits = {}
    for layer in exits:
        with reference.at_exit(model, vlm.config, layer):
            alone = [model(**row).logits[0].numpy() for row in rows]
        logits[layer] = np.stack([np.pad(row, ((length - len(row), 0), (0, 0))) for row in alone])
    return np.stack(hidden), logits


def _hf_greedy(model: Any, row: dict[str, Any], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the greedy tokens [32] of one row, and the gap between the two largest logits before each."""
    import torch

    out = model.generate(**row)
    tokens = out.sequences[0, row["input_ids"].shape[1] :].numpy()
    top = torch.stack(out.scores, dim=1)[0].topk(2, dim=-1).values
    missing = (0, NEW_TOKENS - len(tokens))
    gaps = np.pad((top[..., 0] - top[..., 1]).numpy(), missing, constant_values=np.inf)
    return np.pad(tokens, missing, constant_values=pad_id), gaps
