"""Reads the limits that a checkpoint's files set for the length of prompts and answers, and checks lengths.

Beyond these limits a model's output is meaningless.
"""

from icet_jax.files import JsonObject

_LARGEST = 1 << 24  # a larger number means "no limit" in transformers' files


def max_positions(config: JsonObject) -> int | None:
    """Returns the decoder's `max_position_embeddings`, from a VLM's parsed config.json; None if it names no limit."""
    text = config.get("text_config", config)  # some files have the decoder's fields at their root
    return _limit(text.get("max_position_embeddings") if isinstance(text, dict) else None)


def max_tokens(tokenizer: object) -> int | None:
    """Returns the `model_max_length` of transformers' tokenizer, in tokens; None if it names no limit."""
    return _limit(getattr(tokenizer, "model_max_length", None))


def _limit(value: object) -> int | None:
    """Returns the value if it is an integer that sets a limit; otherwise None."""
    return value if type(value) is int and 0 < value < _LARGEST else None


def beyond_positions(length: int, max_new_tokens: int, limit: int | None) -> str | None:
    """Returns an error message if a prompt and its answer do not fit the model; None if they fit.

    Args:
      length: number of positions of the prompt, including those of its images.
      max_new_tokens: largest number of tokens of the answer.
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
    """Returns an error message if a prompt is too long for the tokenizer; None if it is not.

    Args:
      count: number of tokens of the prompt, without those of its images.
      limit: result of `max_tokens`.
    """
    if limit is None or count <= limit:
        return None
    return (
        f"the prompt takes {count} tokens without its images, but the model's texts have at most {limit} "
        "(tokenizer_config.json: model_max_length); shorten the prompt"
    )
