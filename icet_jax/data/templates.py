"""Chat templates, in Python: a prompt and its images as the text a family was tuned on."""

IMAGE_TOKEN = "<image>"


def llava_15(prompt: str, num_images: int) -> str:
    """The single-turn template of LLaVA-1.5's checkpoints on the hub: images first, no system prompt.

    A row without images has no placeholder. The tokenizer adds BOS.
    """
    placeholders = f"{IMAGE_TOKEN}\n" * num_images
    return f"USER: {placeholders}{prompt} ASSISTANT:"
