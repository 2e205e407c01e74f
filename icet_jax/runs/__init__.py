"""Parts that several command-line modes share: loading, data sources, measuring, run directories and model cards."""
