"""The command-line modes, one file each; every `run(config, workdir, options)` reads from top to bottom."""
