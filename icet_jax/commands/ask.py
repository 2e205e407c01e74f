"""`--mode=ask` answers one prompt about a user's own images at several exits, side by side."""

import argparse
import itertools
import shutil
import textwrap
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from icet_jax.config import require
from icet_jax.errors import UserError
from icet_jax.media.images import open_image
from icet_jax.runs import loading, shipped
from icet_jax.runs.sources import checkpoint_directory

_DEFAULT_EXITS = 5  # number of evenly spaced exits, besides the default exit, that answer if --exits is unset
_MIN_COLUMN_WIDTH = 28  # smallest width of a column in characters
_GAP = "  "  # space between two columns


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Prints the model's answer at each requested exit, side by side; returns 0.

    The images are opened and encoded once, up to the last requested exit.

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
    images = [shipped.example(path) for path in options.image]
    for image in images:
        open_image(image)  # what cannot be opened is found before the model is loaded
    model = config.model
    directory = checkpoint_directory(model.checkpoint, workdir)
    vlm = loading.load(
        directory, dtype=model.dtype, revision=model.revision, adapter=model.adapter, exit_rule=model.exit_rule,
        capture=model.intermediate_capture, template=config.data.template,
    )  # fmt: skip
    exits = parse_exits(options.exits, vlm.num_exits, vlm.default_exit)
    inputs = vlm.processor(images=[images], prompts=[options.prompt])
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
    """Returns the exits that `--exits` asks for, in ascending order.

    Args:
      text: "all", or numbers such as "1,12,23"; None means five evenly spaced exits and the default exit.
      num_exits: number of the model's exits, which count from 1.
      default_exit: exit that the model was trained on.

    Raises:
      UserError: the text is not a list of whole numbers, or an exit is out of range.
    """
    if text is None:
        evenly_spaced = np.linspace(1, num_exits, min(_DEFAULT_EXITS, num_exits)).round().astype(int).tolist()
        return sorted({*evenly_spaced, max(default_exit, 1)})
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
    """Returns one column of wrapped text per answer, with the answer's name above.

    As many columns as fit into `width` characters stand next to each other; the other columns follow below.
    """
    most_columns = max(1, (width + len(_GAP)) // (_MIN_COLUMN_WIDTH + len(_GAP)))
    num_blocks = -(-len(answers) // most_columns)
    blocks = [block.tolist() for block in np.array_split(np.asarray(list(answers), dtype=object), num_blocks)]
    column_width = (width + len(_GAP)) // max(map(len, blocks)) - len(_GAP)
    return "\n\n".join(_columns({name: answers[name] for name in block}, column_width) for block in blocks)


def _columns(answers: dict[str, str], width: int) -> str:
    """Returns the answers as columns that are `width` characters wide and all stand next to each other."""
    columns = [[name, "-" * width, *(textwrap.wrap(answer, width) or ["(empty)"])] for name, answer in answers.items()]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(_GAP.join(cell.ljust(width) for cell in row).rstrip() for row in rows)
