"""Images, tokenizers and chat templates, read from files within safe limits."""
