"""Toxicity classifiers (metric "ts"): BERT or RoBERTa with one sigmoid per label, applied to the response alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax import nn
from jax.sharding import Mesh
from jax.stages import Lowered

from icet_jax.errors import UserError
from icet_jax.media.tokenizer import Tokenizer
from icet_jax.nn.bert import BertClassifier
from icet_jax.scorers.base import Scores, metric_name
from icet_jax.scorers.rows import BatchedNetwork
from icet_jax.scorers.source import CheckpointSource, fingerprint
from icet_jax.typing import Array

MAIN_HEADS = ("toxic", "toxicity")
"""Labels of the overall toxicity in toxic-bert and unbiased-toxic-roberta."""


class Toxicity:
    """Computes probabilities 0..1 that a response is toxic.

    The main head's result is called `name`, the result of any other head `name.HEAD`.

    Attributes:
      name, metric, reads_prompts, fingerprint: see `Scorer`.
      heads: {result name: column of the network's output}.
    """

    metric = "ts"
    reads_prompts = False

    def __init__(
        self,
        model: BertClassifier,
        tokenizer: Tokenizer,
        *,
        name: str,
        labels: Sequence[str],
        heads: Sequence[str] = (),
        batch_size: int = 64,
        mesh: Mesh | None = None,
        fingerprint: str = "",
    ) -> None:
        """Splits the model into structure and weights; nothing is compiled yet.

        Args:
          model: the network.
          tokenizer: transformers' tokenizer.
          name: name of the scorer in metrics.
          labels: labels of the network's outputs, in order.
          heads: labels to report besides the main head. The main head is the one labelled "toxic" or "toxicity"; if the
            network has neither, it is the first of `heads`.
          batch_size: responses scored at once.
          mesh: mesh of the weights.
          fingerprint: see `Scorer`.

        Raises:
          UserError: a head is unknown, there is no main head, or two heads would have the same name in metrics.
        """
        self.name, self.fingerprint = name, fingerprint
        self.heads = _columns_by_result(name, list(labels), list(heads))
        self._tokenizer, self._max_length = tokenizer, model.config.max_length
        graphdef, params = nnx.split(model)

        def score(params: nnx.State, tokens: Array, mask: Array) -> Array:
            return nn.sigmoid(nnx.merge(graphdef, params)(tokens, mask))

        self.network = BatchedNetwork(
            score, params, longest=self._max_length, batch_size=batch_size, mesh=mesh, cache_key=(graphdef,)
        )

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Returns the probabilities of B responses by result name; NaN where the network gives no finite number.

        Responses are truncated to the network's longest input.
        """
        rows: list[list[int]] = []
        if responses:
            encoded = self._tokenizer(list(responses), truncation=True, max_length=self._max_length)
            rows = [list(ids) for ids in encoded["input_ids"]]
        values = self.network(rows)
        values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
        return {name: Scores(values[:, column], [None] * len(rows)) for name, column in self.heads.items()}

    def lowered(self, tokens: int | None = None) -> Iterator[tuple[str, Lowered]]:
        """Yields the programs for responses of up to `tokens` tokens, see `BatchedNetwork.lowered`."""
        return self.network.lowered(tokens)


def head_labels(hf_config: Mapping[str, Any]) -> list[str]:
    """Returns the labels of a classifier's outputs in order, as its config.json lists them in `id2label`.

    Without `id2label` they are called `LABEL_0`, `LABEL_1`, ..., as in transformers.

    Raises:
      UserError: the labels are not numbered from 0, or the classifier has one softmax over all labels.
    """
    if hf_config.get("problem_type") not in (None, "multi_label_classification"):
        raise UserError(
            f"config.json: problem_type '{hf_config['problem_type']}' is not supported; a toxicity classifier has "
            "one sigmoid per label (multi_label_classification)"
        )
    count = hf_config.get("num_labels") or 2  # transformers' default
    id2label = hf_config.get("id2label") or {str(column): f"LABEL_{column}" for column in range(count)}
    try:
        return [str(id2label[str(column)]) for column in range(len(id2label))]
    except KeyError as error:
        raise UserError(f"config.json: id2label must number its labels from 0, not {', '.join(id2label)}") from error


def _columns_by_result(name: str, labels: list[str], heads: list[str]) -> dict[str, int]:
    """Returns {result name: column of the network's output}, the main head first; see `Toxicity` for the arguments."""
    unknown = [head for head in heads if head not in labels]
    if unknown:
        raise UserError(f"{name}: has no head '{unknown[0]}'; its heads are {', '.join(labels)}")
    main = next((label for label in labels if label.lower() in MAIN_HEADS), heads[0] if heads else None)
    if main is None:
        raise UserError(f"{name}: none of its heads is called toxic or toxicity; choose heads of {', '.join(labels)}")
    further = [head for head in dict.fromkeys(heads) if head != main]
    columns = {name: labels.index(main)} | {f"{name}.{metric_name(head)}": labels.index(head) for head in further}
    if len(columns) < 1 + len(further):
        raise UserError(f"{name}: two of the heads {', '.join(heads)} have the same name in metrics; leave one out")
    return columns


def make_scorer(source: CheckpointSource, heads: Sequence[str] = ()) -> Toxicity:
    """Returns the toxicity classifier of a checkpoint.

    Args:
      source: the checkpoint.
      heads: labels to report besides the main head, see `Toxicity`.

    Raises:
      UserError: a template was given, a head does not exist, or the checkpoint is broken.
    """
    if source.template is not None:
        raise UserError("a toxicity classifier reads the response as it is and takes no template")
    labels = head_labels(source.config)
    checkpoint = source.load()
    return Toxicity(
        checkpoint.model,
        source.tokenizer,
        labels=labels,
        heads=heads,
        fingerprint=fingerprint(checkpoint, list(heads)),
        **source.common,
    )
