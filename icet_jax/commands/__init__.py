"""One file per command-line mode."""
