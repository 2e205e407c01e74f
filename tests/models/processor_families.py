"""Directories with the config, tokenizer and processor files of each family, without weights."""

import json
from pathlib import Path

from icet_jax.models.base.processor import load_processor
from tests import tiny, tiny_families

FAMILIES = ("llava", "llava_next", "mllama")


def write(folder, family, **text):
    """The files of a toy checkpoint; returns the HF config."""
    folder = Path(folder)
    if family == "llava":
        config, old = tiny.llava_config(**text), tiny.old_config
        tiny.save_processor(folder, config)
    elif family == "llava_next":
        config, old = tiny_families.llava_next_config(**text), tiny_families.old_next_config
        tiny_families.save_next_processor(folder, config)
    else:
        config, old = tiny_families.mllama_config(**text), tiny_families.old_mllama_config
        tiny_families.save_mllama_processor(folder, config)
    (folder / "config.json").write_text(json.dumps(old(config)))
    return config


def processor(folder, family, **text):
    write(folder, family, **text)
    return load_processor(folder)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
