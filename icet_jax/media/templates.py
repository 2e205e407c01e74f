"""Chat templates, which turn a prompt and its images into the text format that a checkpoint was trained on.

A checkpoint's own Jinja template is preferred. If its files contain none with images, the template that its model
family was published with is used.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from icet_jax.errors import UserError, one_line
from icet_jax.files import parse_json
from icet_jax.media.chat_templates import DATE, render

IMAGE_TOKEN = "<image>"
MLLAMA_IMAGE_TOKEN = "<|image|>"
QWEN_IMAGE_TOKEN = "<|image_pad|>"
PLACEHOLDERS = (IMAGE_TOKEN, MLLAMA_IMAGE_TOKEN, QWEN_IMAGE_TOKEN)
"""Texts that stand for an image in some family. No prompt may contain them, so that all families use the same rows."""

Template: TypeAlias = Callable[[str, int], str]
"""Function of (prompt, number of images) that returns the text up to the answer, with a placeholder for each image."""

_PROBE = "probe 5f1c"


def llava_15(prompt: str, num_images: int) -> str:
    """Formats a prompt for LLaVA-1.5, without system prompt and beginning-of-sequence token (the tokenizer adds it)."""
    return f"USER: {_image_lines(num_images)}{prompt} ASSISTANT:"


def vicuna_v1(prompt: str, num_images: int) -> str:
    """Formats a prompt with the system prompt of `conv_vicuna_v1` in LLaVA-1.5's original code."""
    return (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. {llava_15(prompt, num_images)}"
    )


def vicuna_16(prompt: str, num_images: int) -> str:
    """Formats a prompt for LLaVA-NeXT on a Vicuna backbone, with the system prompt of its model card."""
    return (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the human's questions. {llava_15(prompt, num_images)}"
    )


def mistral_16(prompt: str, num_images: int) -> str:
    """Formats a prompt for LLaVA-NeXT on a Mistral backbone."""
    return f"[INST] {_image_lines(num_images)}{prompt} [/INST]"


def llama_32(prompt: str, num_images: int) -> str:
    """Formats a prompt for Llama 3.2 Vision, with the beginning-of-sequence token.

    A prompt without images follows a system message with the date.
    """
    system = (
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        f"Today Date: {DATE}\n\n<|eot_id|>"
    )
    return (
        f"<|begin_of_text|>{'' if num_images else system}<|start_header_id|>user<|end_header_id|>\n\n"
        f"{MLLAMA_IMAGE_TOKEN * num_images}{prompt}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


NAMED_TEMPLATES: dict[str, Template] = {"vicuna_v1": vicuna_v1, "llava_v1": vicuna_16}
"""Templates that `config.data.template` can name; the names are those of conversations in the original LLaVA code."""


def _image_lines(num_images: int) -> str:
    """Returns a line with a placeholder for each image."""
    return f"{IMAGE_TOKEN}\n" * num_images


def own_template(directory: Path, tokenizer: Any, placeholder: str) -> Template | None:
    """Returns a checkpoint's own template, rendered as transformers does; None if it has no usable one.

    The template is taken from the files of HF's processor or, if the one there is missing or not usable, from those of
    the tokenizer. A template is usable if it repeats the prompt once and has one placeholder for each image. If it is
    not usable, a line on standard error names the file, the reason and the template that is used instead. No such line
    is printed for a tokenizer's template that is made for conversations without images.

    Args:
      directory: directory of the checkpoint.
      tokenizer: transformers' tokenizer from the same directory.
      placeholder: text that stands for an image.

    Raises:
      UserError: a file of templates cannot be read.
    """
    path, source = _processor_template(directory)
    template, problem = _try_template(tokenizer, source, placeholder) if source is not None else (None, None)
    problems = [(path, problem)]
    tokenizer_source = tokenizer.chat_template
    if template is None and isinstance(tokenizer_source, str) and tokenizer_source != source:
        path = directory / "tokenizer_config.json"
        template, problem = _try_template(tokenizer, tokenizer_source, placeholder)
        if not _is_for_text(tokenizer, tokenizer_source):
            problems.append((path, problem))
    used_instead = "the one that the model's family was published with" if template is None else f"that of {path}"
    for file, problem in problems:
        if problem is not None:
            _warn(f"{file}: the chat template in it is not used ({problem}); used instead: {used_instead}")
    return template


def _try_template(tokenizer: Any, source: str, placeholder: str) -> tuple[Template | None, str | None]:
    """Returns (template, None) for a usable Jinja source, else (None, the reason why it cannot be used)."""
    template = _from_jinja(tokenizer, source)
    try:
        text = template(_PROBE, 2)
    except UserError as error:
        return None, str(error).removesuffix("; give a template")
    if text.count(_PROBE) == 1 and text.count(placeholder) == 2:
        return template, None
    return None, "it does not show a prompt once and each of its images once"


def _is_for_text(tokenizer: Any, source: str) -> bool:
    """Returns whether a template accepts messages in the form of text-only language models."""
    try:
        return _PROBE in render(tokenizer, [{"role": "user", "content": _PROBE}], template=source, answer=True)
    except UserError:
        return False


@functools.cache
def _warn(line: str) -> None:
    """Prints a line to standard error, only once in this process."""
    print(f"icet-jax: {one_line(line)}", file=sys.stderr)


def _from_jinja(tokenizer: Any, source: str) -> Template:
    """Returns a template that renders a Jinja source."""

    def template(prompt: str, num_images: int) -> str:
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
        return render(tokenizer, [{"role": "user", "content": content}], template=source, answer=True)

    return template


def _processor_template(directory: Path) -> tuple[Path, str | None]:
    """Returns (file with the processor's chat template, Jinja source in it); the source is None if no file exists.

    The file is chat_template.jinja of transformers 5, or one that earlier versions write.
    """
    path = directory / "chat_template.jinja"
    try:
        if path.is_file():
            return path, path.read_text(encoding="utf-8")
        for name in ("chat_template.json", "processor_config.json"):
            path = directory / name
            if path.is_file():
                settings = parse_json(path.read_text(encoding="utf-8"))
                template = settings.get("chat_template") if isinstance(settings, dict) else None
                if isinstance(template, str) and template:
                    return path, template
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it from the checkpoint's source") from error
    return path, None
