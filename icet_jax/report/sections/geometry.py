"""The section on geometry: how far the image features of each exit are from those of the default exit."""

from icet_jax.report.blocks import Block, grid, note
from icet_jax.report.comparison import Comparison
from icet_jax.report.curves import geometry_charts, single_figure
from icet_jax.report.method import trained_parts
from icet_jax.report.overlays import geometry_overlays
from icet_jax.report.study import Study


def of_study(study: Study) -> list[Block]:
    """Returns charts of norm ratio, cosine and CKA over exits; an empty list if the run did not measure them."""
    charts = geometry_charts(study)
    images = study.first_run.geometry.get("n_images")
    words = f"Means over {images} images. " + (
        "Measured before training, which changed the projector."
        if "projector" in trained_parts(study.first_run.config)
        else "Tower and projector are frozen, so this is the same before and after training."
    )
    blocks = grid([single_figure(chart, f"geometry/{name}") for name, chart in charts.items()])
    return [*blocks, note(words)] if blocks and images else blocks


def of_comparison(comparison: Comparison) -> list[Block]:
    """Returns charts of norm ratio, cosine and CKA over relative depth, with a line per run."""
    return list(geometry_overlays(comparison))
