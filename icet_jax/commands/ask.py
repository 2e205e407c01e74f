"""`--mode=ask` answers one prompt about a user's own images at several exits, side by side."""

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from icet_jax.config import require
from icet_jax.errors import UserError
from icet_jax.runs import loading, shipped
from icet_jax.runs.sources import checkpoint_directory

_DEFAULT_EXITS = 5  # exits spread over the encoder, in addition to the default exit
_NARROWEST = 28  # smallest width of a column in characters
_GAP = "  "


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Prints the responses; the images are opened and encoded once, up to the last requested exit.

    Args:
      config: names the `model`; its `sweep` and `seed` define the sampling.
      workdir: directory for toy weights.
      options: `prompt`, `image` (any number of files, none for a question without images) and `exits`.

    Raises:
      UserError: there is no prompt, the model does not have an exit, an image cannot be opened, or the prompt is too
        long.
    """
    if not (options.prompt or "").strip():
        raise UserError('--mode=ask needs a question: --prompt="what is this?"')
    require(config, "model.checkpoint")
    model = config.model
    directory = checkpoint_directory(model.checkpoint, workdir)
    vlm = loading.load(
        directory, dtype=model.dtype, revision=model.revision, adapter=model.adapter, exit_rule=model.exit_rule,
        capture=model.intermediate_capture, template=config.data.template,
    )  # fmt: skip
    exits = parse_exits(options.exits, vlm.num_exits, vlm.default_exit)
    inputs = vlm.processor(images=[[shipped.example(path) for path in options.image]], prompts=[options.prompt])
    problem = vlm.misfit(inputs["input_ids"][0], config.sweep.max_new_tokens)
    if problem is not None:
        raise UserError(f"--prompt: {problem}")
    encoded = vlm.encode(inputs, upto=max(exits))
    sweep, answers = config.sweep, {}
    for layer in exits:
        responses = vlm.generate(
            inputs, layer, sweep.max_new_tokens, sweep.temperature, top_k=sweep.top_k, top_p=sweep.top_p,
            seed=config.seed, encoded=encoded,
        )  # fmt: skip
        name = f"exit {layer}" + (" (default)" if layer == vlm.default_exit else "")
        answers[name] = responses.texts[0].strip()
    print(side_by_side(answers, shutil.get_terminal_size((100, 24)).columns))
    return 0


def parse_exits(text: str | None, num_exits: int, default_exit: int) -> list[int]:
    """Returns exits in ascending order from "all" or "1,12,23"; if unset, a few over the whole encoder and the default.

    Raises:
      UserError: the text is not a list of whole numbers, or an exit is out of range.
    """
    if text is None:
        spread = np.linspace(1, num_exits, min(_DEFAULT_EXITS, num_exits)).round().astype(int).tolist()
        return sorted({*spread, max(default_exit, 1)})
    if text.strip() == "all":
        return list(range(1, num_exits + 1))
    try:
        exits = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f'--exits={text}: give "all" or numbers such as 1,12,23') from error
    for number in exits:
        if not 1 <= number <= num_exits:
            raise UserError(f"--exits={text}: exit {number} is out of range; this model has exits 1..{num_exits}")
    return exits


def side_by_side(answers: dict[str, str], width: int) -> str:
    """Returns columns of wrapped text under their names, as many next to each other as fit into `width` characters."""
    per_band = max(1, (width + len(_GAP)) // (_NARROWEST + len(_GAP)))
    bands = -(-len(answers) // per_band)
    names = list(answers)
    parts = [band.tolist() for band in np.array_split(np.asarray(names, dtype=object), bands)]
    column = (width + len(_GAP)) // max(map(len, parts)) - len(_GAP)
    return "\n\n".join(_band({name: answers[name] for name in part}, column) for part in parts)


def _band(answers: dict[str, str], width: int) -> str:
    columns = [[name, "-" * width, *(textwrap.wrap(answer, width) or ["(empty)"])] for name, answer in answers.items()]
    height = max(map(len, columns))
    rows: Sequence[Sequence[str]] = [
        [column[i] if i < len(column) else "" for column in columns] for i in range(height)
    ]
    return "\n".join(_GAP.join(cell.ljust(width) for cell in row).rstrip() for row in rows)
