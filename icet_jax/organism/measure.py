"""Measures an organism's answers at every exit with the world's exact judge, on held-out requests and pictures."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.generation import Sampling, generate, suppress_ids
from icet_jax.nn.protocols import EncodedImages, Images
from icet_jax.organism import tokenizer, training, world
from icet_jax.organism.families import architecture_of
from icet_jax.typing import Array, PyTree

MEASURES = {
    "forbidden": ("complied", "degenerate"),
    "benign": ("right", "refused", "degenerate"),
    "vqa": ("right", "refused", "degenerate"),
}
"""{kind of rows: measured shares}, see `measure`."""


def responses(model: Any, rows: world.WorldRows, exits: tuple[int, ...]) -> dict[int, list[str]]:
    """Returns {exit: greedy responses to `rows`}; the image encoder runs once."""
    vocabulary, architecture, count = tokenizer.vocabulary(), architecture_of(model), len(rows.prompts)
    width = training.TEXT_TOKENS + len(architecture.picture)
    packed = training.pack(rows.prompts, [""] * count, architecture.picture, width)
    tokens, mask = (jnp.asarray(column[:, :width]) for column in (packed.tokens, packed.mask))
    eos, pad, image = (vocabulary[name] for name in (tokenizer.EOS, tokenizer.PAD, tokenizer.IMAGE))
    sampling = Sampling(
        max_new_tokens=training.RESPONSE_TOKENS + 4,  # more than any right response has
        temperature=0.0,
        eos_ids=(eos,),
        suppress_ids=suppress_ids(image, pad, (eos,)),
        pad_id=pad,
    )
    graph, params = nnx.split(model)
    keys = jax.random.split(jax.random.key(0), len(tokens))

    @jax.jit
    def encode(params: PyTree, images: Images) -> EncodedImages:
        return nnx.merge(graph, params).encode(images)

    @jax.jit
    def answer(params: PyTree, encoded: EncodedImages, tokens: Array, mask: Array, exit_layer: Array) -> Array:
        model = nnx.merge(graph, params)
        return generate(model, tokens, mask, model.visual(encoded, exit_layer), keys, sampling).tokens

    encoded = encode(params, architecture.images(rows.images, np.arange(count), count))
    texts = {}
    for exit_layer in exits:
        ids = np.asarray(answer(params, encoded, tokens, mask, np.int32(exit_layer)))
        texts[exit_layer] = [tokenizer.decode(row.tolist()) for row in ids]
    return texts


def measure(model: Any, *, rows: int = 256) -> dict[str, list[float]]:
    """Returns {"KIND: LABEL": share (0 to 1) of answers with that label at each exit 1..num_exits}.

    The answers are to `rows` held-out rows of each kind. The labels "complied", "refused" and "degenerate" are those of
    the exact judge; "right" means the expected answer.
    """
    exits = tuple(range(1, model.num_exits + 1))
    shares: dict[str, list[float]] = {}
    for kind, names in MEASURES.items():
        batch = world.rows("test", kind, np.arange(rows), 0)
        for texts in responses(model, batch, exits).values():
            labels = [world.judge(prompt, text) for prompt, text in zip(batch.prompts, texts, strict=True)]
            right = [world.correct(answer, text) for answer, text in zip(batch.answers, texts, strict=True)]
            for name in names:
                hits = right if name == "right" else [label == name for label in labels]
                shares.setdefault(f"{kind}: {name}", []).append(float(np.mean(hits)))
    return shares


def table(shares: dict[str, list[float]]) -> str:
    """Returns the result of `measure` as text, in percent, with a line for each label and a column for each exit."""
    exits = range(1, 1 + len(next(iter(shares.values()))))
    lines = ["exit".ljust(24) + "".join(f"{exit_layer:6d}" for exit_layer in exits)]
    lines += [name.ljust(24) + "".join(f"{100 * value:6.1f}" for value in values) for name, values in shares.items()]
    return "\n".join(lines)
