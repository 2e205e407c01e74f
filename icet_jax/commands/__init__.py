"""The command-line modes, one file each, whose function `run(config, workdir, options)` does all the work in order."""
