"""The sections of the pages, one module each. `of_study` returns the blocks of a report, `of_comparison` those of a
comparison of runs."""
