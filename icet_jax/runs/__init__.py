"""What several modes share: configs, sources of rows, models, scorers and run directories."""
