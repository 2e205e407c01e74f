"""One file per mode of the front door; each `run(config, workdir, options)` reads top to bottom."""
