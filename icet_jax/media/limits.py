"""The longest texts that a model and its tokenizer support according to their files; longer ones give meaningless
output."""

from icet_jax.files import JsonObject

_LARGEST = 1 << 24  # transformers writes a larger number if there is no limit


def max_positions(config: JsonObject) -> int | None:
    """Returns the decoder's `max_position_embeddings` in a parsed config.json; None if it has none.

    Args:
      config: config.json of a vision-language model.
    """
    text = config.get("text_config")
    return _plausible(text.get("max_position_embeddings") if isinstance(text, dict) else None)


def max_tokens(tokenizer: object) -> int | None:
    """Returns the most tokens that a text may have according to transformers' tokenizer; None if it names no limit."""
    return _plausible(getattr(tokenizer, "model_max_length", None))


def _plausible(value: object) -> int | None:
    return value if type(value) is int and 0 < value < _LARGEST else None


def beyond_positions(length: int, max_new_tokens: int, limit: int | None) -> str | None:
    """Returns why a prompt and its response do not fit the model; None if they fit.

    Args:
      length: positions of the prompt, including those of its images.
      max_new_tokens: most tokens of the response.
      limit: result of `max_positions`.
    """
    if limit is None or length + max_new_tokens <= limit:
        return None
    answer = f" and the answer up to {max_new_tokens} (max_new_tokens)" if max_new_tokens else ""
    advice = " or lower max_new_tokens" if max_new_tokens and length < limit else ""
    return (
        f"the prompt takes {length} positions, images included{answer}, but the model has {limit} (config.json: "
        f"text_config.max_position_embeddings); shorten the prompt{advice}"
    )


def beyond_tokens(count: int, limit: int | None) -> str | None:
    """Returns why a prompt does not fit the tokenizer; None if it fits.

    Args:
      count: tokens of the prompt, without those of its images.
      limit: result of `max_tokens`.
    """
    if limit is None or count <= limit:
        return None
    return (
        f"the prompt takes {count} tokens without its images, but the model's texts have at most {limit} "
        "(tokenizer_config.json: model_max_length); shorten the prompt"
    )
