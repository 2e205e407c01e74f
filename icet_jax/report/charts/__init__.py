"""Draws charts: a chart is laid out once as marks, which `svg.py` writes into the page and `png.py` into a file."""
