"""Every test runs on the CPU in full float32, and every array annotation is checked at run time."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

hook = install_import_hook("icet_jax", "beartype.beartype")

import jax

jax.config.update("jax_default_matmul_precision", "highest")
