"""Reward models as scorers (metric "tr"): a network with one scalar head reads prompt and response as text.

Sources:
  HF `GPT2ForSequenceClassification` (the paper's, `Ray2333/gpt2-large-harmless-reward_model`),
  `DebertaV2ForSequenceClassification` (`OpenAssistant/reward-model-deberta-v3-large-v2`) and
  `LlamaForSequenceClassification`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from icet_jax.errors import UserError
from icet_jax.nn.gpt2 import GPT2Config
from icet_jax.nn.llama import LlamaConfig
from icet_jax.scorers.base import Scores
from icet_jax.scorers.pairs import HH_TEMPLATE, ChatPairs, PairTokenizer, SegmentTokenizer
from icet_jax.scorers.prompts import Render, chat_template, text_template
from icet_jax.scorers.rows import BatchedNetwork
from icet_jax.scorers.source import STORED_SETTINGS, CheckpointSource, fingerprint

Pairs: TypeAlias = PairTokenizer | SegmentTokenizer | ChatPairs

_STEPS = {LlamaConfig: 4}  # length buckets per doubling for expensive networks; powers of two for the others


def pair_encoder(
    config: Any,
    tokenizer: Any,
    template: str | None = None,
    *,
    max_length: int | None = None,
    pad_id: int | None = None,
) -> Pairs:
    """Returns the encoder of pairs for a network of this family.

    Args:
      config: `GPT2Config`, `DebertaConfig` or `LlamaConfig`.
      tokenizer: transformers' tokenizer.
      template: for GPT-2 and DeBERTa the first segment, with `{prompt}` in it (`HH_TEMPLATE`; the bare prompt). For
        Llama the whole text with `{prompt}` and `{response}`, or None for the tokenizer's chat template.
      max_length: most tokens of a pair; None for GPT-2's positions, the only ones that a network's config contains.
      pad_id: config.json's pad_token_id, with which a Llama pair must not end.

    Raises:
      UserError: the template has another form, or is missing where it is required.
    """
    if isinstance(config, GPT2Config):
        template = HH_TEMPLATE if template is None else template
        return PairTokenizer(tokenizer, template=template, max_length=max_length or config.n_positions)
    assert max_length is not None, "the config of a DeBERTa or a Llama has no limit"
    if isinstance(config, LlamaConfig):
        return ChatPairs(tokenizer, reward_render(tokenizer, template), max_length=max_length, pad_id=pad_id)
    return SegmentTokenizer(tokenizer, template="{prompt}" if template is None else template, max_length=max_length)


def reward_render(tokenizer: Any, template: str | None) -> Render:
    """Returns the template of a Llama reward model; see `pair_encoder`, also for errors."""
    return chat_template(tokenizer, answer=False) if template is None else text_template(template)


class RewardModel:
    """Scores pairs with a reward model; one program is compiled per length bucket.

    Attributes:
      name, metric, fingerprint: see `Scorer`.
      model: the network.
      pairs: encodes pairs as tokens.
      network: runs the model on batches of them.
    """

    metric = "tr"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        template: str | None = None,
        max_length: int | None = None,
        pad_id: int | None = None,
        batch_size: int = 64,
        mesh: Mesh | None = None,
        fingerprint: str = "",
    ) -> None:
        """Splits the model into structure and weights; nothing is compiled yet.

        Args:
          model: `GPT2RewardModel`, `DebertaRewardModel` or `LlamaRewardModel`.
          tokenizer: transformers' tokenizer.
          name: name of the scorer in metrics.
          template: see `pair_encoder`, also for `max_length` and `pad_id`.
          max_length: most tokens of a pair.
          pad_id: config.json's pad_token_id.
          batch_size: rows per call of the network; a shorter last batch is filled up.
          mesh: mesh of the weights.
          fingerprint: what the scores depend on besides the name.

        Raises:
          UserError: see `pair_encoder`.
        """
        self.name, self.model, self.fingerprint = name, model, fingerprint
        self.pairs = pair_encoder(model.config, tokenizer, template, max_length=max_length, pad_id=pad_id)
        graphdef, params = nnx.split(model)

        def score(params: nnx.State, tokens: Any, mask: Any) -> Any:
            return nnx.merge(graphdef, params)(tokens, mask)

        self.network = BatchedNetwork(
            score, params, longest=self.pairs.max_length, batch_size=batch_size, mesh=mesh,
            steps=_STEPS.get(type(model.config), 1), about=(graphdef,),
        )  # fmt: skip

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Returns raw rewards (no sigmoid); NaN for a pair without any token, or if a score is not finite."""
        values = self.score_tokens(self.pairs(prompts, responses))
        return {self.name: Scores(values, [None] * len(values))}

    def lowered(self, tokens: int | None = None) -> Iterator[tuple[str, Any]]:
        """Yields the lowered programs for pairs of up to `tokens` tokens (of any length if None), see
        `BatchedNetwork.lowered`."""
        return self.network.lowered(tokens)

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the scores float32 [B] of token rows; rows of similar length share a batch."""
        values = self.network(rows)
        values[[not row for row in rows]] = np.nan
        values[~np.isfinite(values)] = np.nan
        return values


def make_scorer(source: CheckpointSource) -> RewardModel:
    """Returns the reward model of a checkpoint.

    Raises:
      UserError: the template has another form, or the checkpoint is broken.
    """
    if source.template is not None and not isinstance(source.template, str):
        raise UserError("a reward model's template is text that holds {prompt}, not a function")
    stored = source.config.get(STORED_SETTINGS, {})
    template = stored.get("template") if source.template is None else source.template
    if source.config["model_type"] == "llama":
        reward_render(source.tokenizer, template)
    checkpoint = source.load()
    return RewardModel(
        checkpoint.model,
        source.tokenizer,
        template=template,
        max_length=None if source.config["model_type"] == "gpt2" else source.positions,
        pad_id=source.config.get("pad_token_id"),
        fingerprint=fingerprint(checkpoint, template),
        **source.common | ({"name": stored["name"]} if "name" in stored else {}),
    )
