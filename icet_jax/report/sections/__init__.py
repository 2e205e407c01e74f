"""The sections of the pages, one module each; `of_study` is what a report shows, `of_comparison` what a comparison."""
