"""Reward models as scorers (metric "tr"): a network with one scalar head reads prompt and response.

Sources:
  HF `GPT2ForSequenceClassification` (the paper's, `Ray2333/gpt2-large-harmless-reward_model`),
  `DebertaV2ForSequenceClassification` (`OpenAssistant/reward-model-deberta-v3-large-v2`) and
  `LlamaForSequenceClassification` with its relatives (`icet_jax.config.names.DECODERS`).
"""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Lowered

from icet_jax.config.names import DECODERS
from icet_jax.errors import UserError
from icet_jax.media.tokenizer import Tokenizer
from icet_jax.nn.deberta import DebertaConfig, DebertaRewardModel
from icet_jax.nn.gpt2 import GPT2Config, GPT2RewardModel
from icet_jax.nn.llama import LlamaConfig
from icet_jax.nn.llama_text import LlamaRewardModel
from icet_jax.scorers.base import Scores
from icet_jax.scorers.pairs import HH_TEMPLATE, DebertaPairTokenizer, GPT2PairTokenizer, LlamaPairTokenizer
from icet_jax.scorers.prompts import Render, chat_template, text_template
from icet_jax.scorers.rows import BatchedNetwork
from icet_jax.scorers.source import STORED_SETTINGS, CheckpointSource, fingerprint
from icet_jax.typing import Array

_NetworkConfig: TypeAlias = GPT2Config | DebertaConfig | LlamaConfig
PairTokenizer: TypeAlias = GPT2PairTokenizer | DebertaPairTokenizer | LlamaPairTokenizer

_LLAMA_BUCKETS_PER_DOUBLING = 4  # padding is expensive for a Llama; other networks use powers of two


def pair_tokenizer(
    config: _NetworkConfig,
    tokenizer: Tokenizer,
    template: str | None = None,
    *,
    max_length: int | None = None,
    pad_id: int | None = None,
) -> PairTokenizer:
    """Returns the tokenizer of (prompt, response) pairs for a network with this config.

    Args:
      config: config of the network.
      tokenizer: transformers' tokenizer.
      template: for GPT-2 and DeBERTa the first segment, which contains `{prompt}`; None for `HH_TEMPLATE` and
        "{prompt}". For a Llama the whole text with `{prompt}` and `{response}`; None for the tokenizer's chat template.
      max_length: largest number of tokens of a pair. None means GPT-2's number of positions; other networks need a
        number.
      pad_id: pad_token_id of config.json; used for a Llama only.

    Raises:
      UserError: the template has the wrong form, or is missing where it is required.
    """
    if isinstance(config, GPT2Config):
        template = HH_TEMPLATE if template is None else template
        return GPT2PairTokenizer(tokenizer, template=template, max_length=max_length or config.n_positions)
    assert max_length is not None, "the config of a DeBERTa or a Llama has no limit"
    if isinstance(config, LlamaConfig):
        render = reward_render(tokenizer, template)
        return LlamaPairTokenizer(
            tokenizer, render, max_length=max_length, pad_id=pad_id, is_chat_template=template is None
        )
    return DebertaPairTokenizer(tokenizer, template="{prompt}" if template is None else template, max_length=max_length)


def template_to_train(config: _NetworkConfig, tokenizer: Tokenizer, template: str | None) -> str | None:
    """Returns the template that a reward model is trained with and stores; None is the tokenizer's chat template.

    Args:
      config: config of the network.
      tokenizer: transformers' tokenizer.
      template: text around the prompt (`config.rm.template`), or None for the default: a decoder's chat template if its
        tokenizer has one, else `HH_TEMPLATE`. Without `{response}`, the response follows the text.
    """
    if not isinstance(config, LlamaConfig):
        return HH_TEMPLATE if template is None else template
    if template is None and tokenizer.chat_template:
        return None
    text = HH_TEMPLATE + " " if template is None else template
    return text if "{response}" in text else text + "{response}"


def reward_render(tokenizer: Tokenizer, template: str | None) -> Render:
    """Returns the template of a Llama reward model; see `pair_tokenizer`, also for errors."""
    return chat_template(tokenizer, answer=False) if template is None else text_template(template)


class RewardModel:
    """Scores pairs with a reward model; one program is compiled per length bucket.

    Attributes:
      name, metric, fingerprint: see `Scorer`.
      model: the network.
      pairs: encodes (prompt, response) pairs as tokens.
      network: runs the model on batches of tokens.
    """

    metric = "tr"

    def __init__(
        self,
        model: GPT2RewardModel | DebertaRewardModel | LlamaRewardModel,
        tokenizer: Tokenizer,
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
          model: the network.
          tokenizer: transformers' tokenizer.
          name: name of the scorer in metrics.
          template, max_length, pad_id: see `pair_tokenizer`.
          batch_size: pairs scored at once.
          mesh: mesh of the weights.
          fingerprint: see `Scorer`.

        Raises:
          UserError: see `pair_tokenizer`.
        """
        self.name, self.model, self.fingerprint = name, model, fingerprint
        self.pairs = pair_tokenizer(model.config, tokenizer, template, max_length=max_length, pad_id=pad_id)
        graphdef, params = nnx.split(model)

        def score(params: nnx.State, tokens: Array, mask: Array) -> Array:
            return nnx.merge(graphdef, params)(tokens, mask)

        self.network = BatchedNetwork(
            score, params, longest=self.pairs.max_length, batch_size=batch_size, mesh=mesh, cache_key=(graphdef,),
            buckets_per_doubling=_LLAMA_BUCKETS_PER_DOUBLING if isinstance(model.config, LlamaConfig) else 1,
        )  # fmt: skip

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Returns the rewards of B pairs as {`name`: scores}: the head's output, without a sigmoid.

        The score of a pair is NaN if the pair has no tokens (a Llama's prompt that is too long) or the output is not
        finite.
        """
        values = self.score_tokens(self.pairs(prompts, responses))
        return {self.name: Scores(values, [None] * len(values))}

    def lowered(self, tokens: int | None = None) -> Iterator[tuple[str, Lowered]]:
        """Yields the programs for pairs of up to `tokens` tokens, see `BatchedNetwork.lowered`."""
        return self.network.lowered(tokens)

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the scores of B rows of token ids, float32 [B]; NaN for a row without tokens."""
        values = self.network(rows)
        values[[not row for row in rows]] = np.nan
        values[~np.isfinite(values)] = np.nan
        return values


def make_scorer(source: CheckpointSource) -> RewardModel:
    """Returns the reward model of a checkpoint.

    Raises:
      UserError: the template has the wrong form, or the checkpoint is broken.
    """
    if source.template is not None and not isinstance(source.template, str):
        raise UserError("a reward model's template is text that holds {prompt}, not a function")
    stored = source.config.get(STORED_SETTINGS, {})
    template = stored.get("template") if source.template is None else source.template
    if source.config["model_type"] in DECODERS:
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
