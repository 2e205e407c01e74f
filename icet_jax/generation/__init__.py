"""Turns prompts into responses by prefill, a decoding loop and sampling, and computes the log-probs that training
uses."""

from icet_jax.generation.decode import Generation, continue_from, generate, prefill
from icet_jax.generation.sampling import Sampling, process_logits, suppress_ids, token_log_probs

__all__ = [
    "Generation",
    "Sampling",
    "continue_from",
    "generate",
    "prefill",
    "process_logits",
    "suppress_ids",
    "token_log_probs",
]
