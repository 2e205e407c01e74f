"""How long a text a model and its tokenizer take, as their files say; what is longer is answered with noise."""

from typing import Any

_LARGEST = 1 << 24  # transformers writes a larger number where there is no limit


def max_positions(config: dict[str, Any]) -> int | None:
    """Positions of the decoder, `max_position_embeddings` of a parsed config.json; None where it names none.

    Args:
      config: of a vision-language model.
    """
    text = config.get("text_config")
    return _sane(text.get("max_position_embeddings") if isinstance(text, dict) else None)


def max_tokens(tokenizer: Any) -> int | None:
    """Tokens that a tokenizer, transformers', says a text may have; None where it says none."""
    return _sane(getattr(tokenizer, "model_max_length", None))


def _sane(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < _LARGEST else None


def beyond_positions(length: int, max_new_tokens: int, limit: int | None) -> str | None:
    """Why a prompt and its answer do not fit the model, or None.

    Args:
      length: positions of the prompt, those of its images included.
      max_new_tokens: of the longest answer.
      limit: see `max_positions`.
    """
    if limit is None or length + max_new_tokens <= limit:
        return None
    answer = f" and the answer up to {max_new_tokens} (max_new_tokens)" if max_new_tokens else ""
    mend = " or lower max_new_tokens" if max_new_tokens and length < limit else ""
    return (
        f"the prompt takes {length} positions, images included{answer}, but the model has {limit} (config.json: "
        f"text_config.max_position_embeddings); shorten the prompt{mend}"
    )


def beyond_tokens(count: int, limit: int | None) -> str | None:
    """Why a prompt does not fit the tokenizer, or None.

    Args:
      count: tokens of the prompt, those of its images not included.
      limit: see `max_tokens`.
    """
    if limit is None or count <= limit:
        return None
    return (
        f"the prompt takes {count} tokens without its images, but the model's texts have at most {limit} "
        "(tokenizer_config.json: model_max_length); shorten the prompt"
    )
