"""Chat templates: a prompt and its images as the text a checkpoint was tuned on.

A checkpoint's own template, in Jinja, comes first; where its files hold none that shows images, the one its family was
published with is used.
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
PLACEHOLDERS = (IMAGE_TOKEN, MLLAMA_IMAGE_TOKEN)
"""Texts that stand for an image in some family; no prompt may hold them, so that all families see the same rows."""

Template: TypeAlias = Callable[[str, int], str]
"""(prompt, number of its images) -> the text, one placeholder for each image, ready for the answer."""

_PROBE = "probe 5f1c"


def llava_15(prompt: str, num_images: int) -> str:
    """LLaVA-1.5's: images first, no system prompt. A row without images has no placeholder. The tokenizer adds BOS."""
    return f"USER: {_lines(num_images)}{prompt} ASSISTANT:"


def vicuna_v1(prompt: str, num_images: int) -> str:
    """The original LLaVA-1.5 code's `conv_vicuna_v1`, whose system prompt says "user"."""
    return (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. {llava_15(prompt, num_images)}"
    )


def vicuna_16(prompt: str, num_images: int) -> str:
    """LLaVA-NeXT's on a Vicuna backbone, with the system prompt of its model card."""
    return (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the human's questions. {llava_15(prompt, num_images)}"
    )


def mistral_16(prompt: str, num_images: int) -> str:
    """LLaVA-NeXT's on a Mistral backbone."""
    return f"[INST] {_lines(num_images)}{prompt} [/INST]"


def llama_32(prompt: str, num_images: int) -> str:
    """Llama 3.2 Vision's. A row without images begins with a system message that tells the date; BOS is included."""
    system = (
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        f"Today Date: {DATE}\n\n<|eot_id|>"
    )
    return (
        f"<|begin_of_text|>{'' if num_images else system}<|start_header_id|>user<|end_header_id|>\n\n"
        f"{MLLAMA_IMAGE_TOKEN * num_images}{prompt}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


NAMED_TEMPLATES: dict[str, Template] = {"vicuna_v1": vicuna_v1, "llava_v1": vicuna_16}
"""Templates that `config.data.template` may name, under the names of the original LLaVA code's conversations."""


def _lines(num_images: int) -> str:
    return f"{IMAGE_TOKEN}\n" * num_images


def own_template(directory: Path, tokenizer: Any, placeholder: str) -> Template | None:
    """A checkpoint's own template, rendered as transformers does; None where it has none that shows images.

    It is looked for where HF's processors do, then in the tokenizer's files, which may hold that of the language model
    alone: one that does not show a user's text once and each image once is passed over. Where that is a processor's,
    or the bounds on templates stop it, a line on standard error says which file is not used, why, and what is instead.

    Args:
      directory: of the checkpoint.
      tokenizer: transformers', of the same directory.
      placeholder: what stands for an image in the text.

    Raises:
      UserError: a file of templates cannot be read.
    """
    path, text = _file_template(directory)
    found, problem = _usable(tokenizer, text, placeholder) if text is not None else (None, None)
    passed_over = [(path, problem)]
    own = tokenizer.chat_template
    if found is None and isinstance(own, str) and own != text:
        path = directory / "tokenizer_config.json"
        found, problem = _usable(tokenizer, own, placeholder)
        if not _is_for_text(tokenizer, own):
            passed_over.append((path, problem))
    used = "the one that the model's family was published with" if found is None else f"that of {path}"
    for refused, problem in passed_over:
        if problem is not None:
            _warn(f"{refused}: the chat template in it is not used ({problem}); used instead: {used}")
    return found


def _usable(tokenizer: Any, text: str, placeholder: str) -> tuple[Template | None, str | None]:
    """The template, or None and why it cannot be used."""
    template = _rendered(tokenizer, text)
    try:
        shown = template(_PROBE, 2)
    except UserError as error:
        return None, str(error).removesuffix("; give a template")
    if shown.count(_PROBE) == 1 and shown.count(placeholder) == 2:
        return template, None
    return None, "it does not show a prompt once and each of its images once"


def _is_for_text(tokenizer: Any, text: str) -> bool:
    """Whether a template is a language model's own, which takes messages without images."""
    try:
        return _PROBE in render(tokenizer, [{"role": "user", "content": _PROBE}], template=text, answer=True)
    except UserError:
        return False


@functools.cache
def _warn(line: str) -> None:
    """Prints a line to standard error, the first time in this process."""
    print(f"icet-jax: {one_line(line)}", file=sys.stderr)


def _rendered(tokenizer: Any, text: str) -> Template:
    def template(prompt: str, num_images: int) -> str:
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
        return render(tokenizer, [{"role": "user", "content": content}], template=text, answer=True)

    return template


def _file_template(directory: Path) -> tuple[Path, str | None]:
    """The template in a processor's files, transformers 5's own file or the older ones, and the file it is in."""
    path = directory / "chat_template.jinja"
    try:
        if path.is_file():
            return path, path.read_text(encoding="utf-8")
        for name in ("chat_template.json", "processor_config.json"):
            path = directory / name
            if path.is_file():
                found = parse_json(path.read_text(encoding="utf-8"))
                template = found.get("chat_template") if isinstance(found, dict) else None
                if isinstance(template, str) and template:
                    return path, template
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it from the checkpoint's source") from error
    return path, None
