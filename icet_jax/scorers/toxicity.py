"""Toxicity classifiers (metric "ts"): BERT or RoBERTa with one sigmoid per label, applied to the response alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax import nn
from jax.sharding import Mesh

from icet_jax.errors import UserError
from icet_jax.nn.bert import BertClassifier
from icet_jax.scorers.base import Scores, metric_name
from icet_jax.scorers.rows import BatchedNetwork
from icet_jax.scorers.source import CheckpointSource, fingerprint

MAIN_HEADS = ("toxic", "toxicity")
"""Labels of the overall toxicity in toxic-bert and unbiased-toxic-roberta."""


class Toxicity:
    """Computes probabilities 0..1 that a response is toxic: `name` for the main head, `name.HEAD` for the others.

    Attributes:
      name, metric, fingerprint: see `Scorer`.
      reads_prompts: False, because a response has the same score for every prompt.
      heads: {result name: column of the network's output}.
    """

    metric = "ts"
    reads_prompts = False

    def __init__(
        self,
        model: BertClassifier,
        tokenizer: Any,
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
          heads: labels to report besides the main one, which is "toxic" or "toxicity", else the first of these.
          batch_size: responses scored at once.
          mesh: mesh of the weights.
          fingerprint: what the scores depend on besides the name.

        Raises:
          UserError: a head is unknown, there is no main head, or two heads would have the same name in metrics.
        """
        self.name, self.fingerprint = name, fingerprint
        self.heads = _columns(name, list(labels), list(heads))
        self._tokenizer, self._max_length = tokenizer, model.config.max_length
        graphdef, params = nnx.split(model)

        def score(params: nnx.State, tokens: Any, mask: Any) -> Any:
            return nn.sigmoid(nnx.merge(graphdef, params)(tokens, mask))

        self.network = BatchedNetwork(
            score, params, longest=self._max_length, batch_size=batch_size, mesh=mesh, about=(graphdef,)
        )

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Scores B responses, each truncated to the network's length; a number that is not finite is an error."""
        rows: list[list[int]] = []
        if responses:
            encoded = self._tokenizer(list(responses), truncation=True, max_length=self._max_length)
            rows = [list(ids) for ids in encoded["input_ids"]]
        values = self.network(rows)
        values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
        return {name: Scores(values[:, column], [None] * len(rows)) for name, column in self.heads.items()}

    def lowered(self, tokens: int | None = None) -> Iterator[tuple[str, Any]]:
        """Yields the lowered programs for responses of up to `tokens` tokens (any if None), see
        `BatchedNetwork.lowered`."""
        return self.network.lowered(tokens)


def head_labels(hf_config: Mapping[str, Any]) -> list[str]:
    """Returns the labels of a classifier's outputs from its config.json (`id2label`; `LABEL_0` ... if it names none).

    Raises:
      UserError: the labels are not numbered from 0, or exclude each other (a softmax, not sigmoids).
    """
    if hf_config.get("problem_type") not in (None, "multi_label_classification"):
        raise UserError(
            f"config.json: problem_type '{hf_config['problem_type']}' is not supported; a toxicity classifier has "
            "one sigmoid per label (multi_label_classification)"
        )
    count = hf_config.get("num_labels") or 2  # transformers' default
    named = hf_config.get("id2label") or {str(column): f"LABEL_{column}" for column in range(count)}
    try:
        return [str(named[str(column)]) for column in range(len(named))]
    except KeyError as error:
        raise UserError(f"config.json: id2label must number its labels from 0, not {', '.join(named)}") from error


def _columns(name: str, labels: list[str], heads: list[str]) -> dict[str, int]:
    unknown = [head for head in heads if head not in labels]
    if unknown:
        raise UserError(f"{name}: has no head '{unknown[0]}'; its heads are {', '.join(labels)}")
    main = next((label for label in labels if label.lower() in MAIN_HEADS), heads[0] if heads else None)
    if main is None:
        raise UserError(f"{name}: none of its heads is called toxic or toxicity; choose heads of {', '.join(labels)}")
    others = [head for head in dict.fromkeys(heads) if head != main]
    columns = {name: labels.index(main)} | {f"{name}.{metric_name(head)}": labels.index(head) for head in others}
    if len(columns) < 1 + len(others):
        raise UserError(f"{name}: two of the heads {', '.join(heads)} have the same name in metrics; leave one out")
    return columns


def make_scorer(source: CheckpointSource, heads: Sequence[str] = ()) -> Toxicity:
    """Returns the classifier of a checkpoint.

    Raises:
      UserError: a template was given, a head does not exist, or the checkpoint is broken.
    """
    if source.template is not None:
        raise UserError("a toxicity classifier reads the response as it is and takes no template")
    labels = head_labels(source.config)
    checkpoint, extra = source.load(), list(heads)
    return Toxicity(
        checkpoint.model,
        source.tokenizer,
        labels=labels,
        heads=heads,
        fingerprint=fingerprint(checkpoint, extra),
        **source.common,
    )
