"""Reads images, tokenizers and chat templates from files within safe limits."""
