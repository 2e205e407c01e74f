"""PNG files beside the page."""

import io
import json
import subprocess
import sys

import pytest
from PIL import Image, ImageColor

from icet_jax.report.charts.figures import Figure, Key, Panel
from icet_jax.report.charts.lines import Chart, Point, Series
from icet_jax.report.charts.marks import COLOURS
from icet_jax.report.charts.png import png
from icet_jax.report.figures import write_figures
from icet_jax.report.loading import load_runs
from icet_jax.report.study import Study
from tests.report import synthetic, synthetic_paper


def test_seeds_of_which_one_lacks_a_metric(tmp_path):
    for seed in range(2):
        run = synthetic.write_run(tmp_path / f"run/seed_{seed}", seed=seed, parts=("organism",))
        for path in run.glob("sweeps/*.benign.json"):
            path.unlink()
        for path in run.glob("sweeps/*.json"):
            table = json.loads(path.read_text())
            for layer in table["layers"]:
                kept = ("asr/world_exact",) if seed else ("asr/world_exact", "length")
                layer["metrics"] = {name: layer["metrics"][name] for name in kept}
            path.write_text(json.dumps(table))
    written = write_figures(Study(load_runs(tmp_path / "run")), tmp_path / "figures")
    assert [path.name for path in written] == ["forbidden.asr_world_exact.png", "forbidden.length.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_shares_by_category_have_a_figure(tmp_path):
    run = synthetic_paper.write_paper_run(tmp_path / "run", after=False)
    for path in run.glob("sweeps/*.json"):
        table = json.loads(path.read_text())
        for layer in table["layers"]:
            layer["metrics"] = {
                name: value for name, value in layer["metrics"].items() if name == synthetic_paper.JUDGES[0]
            }
        path.write_text(json.dumps(table)) if "mini" in path.name else path.unlink()
    (run / "utility.json").unlink()
    names = [path.name for path in write_figures(Study(load_runs(run)), run / "figures")]
    assert names == ["mini.asr_llama_guard_3_8b.png", "mini.asr_llama_guard_3_8b.policies.png"]


def test_names_are_safe_file_names(tmp_path):
    run = synthetic.write_run(tmp_path / "run", after=False, parts=())
    (run / "sweeps/before.benign.json").unlink()
    path = run / "sweeps/before.forbidden.json"
    table = json.loads(path.read_text())
    for layer in table["layers"]:
        layer["metrics"] = {"asr/../../x y": layer["metrics"]["asr/world_exact"]}
    path.write_text(json.dumps(table))
    written = write_figures(Study(load_runs(run)), run / "figures")
    assert [file.name for file in written] == ["forbidden.asr_.._.._x_y.png"]
    assert written[0].parent == run / "figures"


def figure(*ys, title="ASR"):
    lines = [Series("after", "after", [Point(x, y) for x, y in enumerate(ys, 1)])]
    chart = Chart(
        title, lines, show=lambda y: f"{y:g}", ticks=range(1, 4), min_y_range=(0.0, 1.0), highlights={2: "default"}
    )
    return Figure(title, "asr/x", (Panel(chart),), (Key("after", "after"),), "forbidden")


def places(data, tone):
    """Pixels of a tone, as (x, y)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    colour = ImageColor.getrgb(COLOURS[tone].light)
    pixels = image.load()
    return [(x, y) for y in range(image.height) for x in range(image.width) if pixels[x, y] == colour]


def test_higher_is_higher_in_the_file_too():
    rising, falling = (places(png(figure(*ys)), "after") for ys in ((0.0, 0.5, 1.0), (1.0, 0.5, 0.0)))
    edge = max(y for _, y in rising)  # the legend's line
    for drawn, sign in ((rising, 1), (falling, -1)):
        curve = [(x, y) for x, y in drawn if y < edge - 60]
        left, right = min(curve), max(curve)
        assert sign * (left[1] - right[1]) > 300


def test_a_figure_is_the_same_file_every_time():
    assert png(figure(0.1, 0.2, 0.3)) == png(figure(0.1, 0.2, 0.3)) != png(figure(0.1, 0.2, 0.4))


def test_dashes_leave_gaps():
    solid, dashed = (
        Figure("t", "n", (Panel(Chart("t", [Series("", tone, [Point(x, 0.5) for x in (1, 2)])], show=str)),))
        for tone in ("run-0", "run-1")
    )
    assert 0.4 < len(places(png(dashed), "run-1")) / len(places(png(solid), "run-0")) < 0.9


def test_a_legend_shows_every_run_however_long_its_name():
    tones = [f"run-{place}" for place in range(8)]
    drawn = figure(0.5)
    keys = tuple(Key(f"runs/a/rather/long/name/{tone}", tone, "line") for tone in tones)
    data = png(Figure(drawn.title, drawn.name, drawn.panels, keys))
    assert all(places(data, tone) for tone in tones)


@pytest.mark.parametrize("title", ["données − élevées …", "中文", "a\nb\x00\u202e", "", "x" * 500])
def test_any_title_can_be_drawn(title):
    assert png(figure(0.5, title=title)).startswith(b"\x89PNG")


def test_reports_need_no_plotting_library(tmp_path):
    synthetic.write_run(tmp_path / "run", after=False, parts=("geometry",))
    code = "import sys; from icet_jax import report; report.build(sys.argv[1]); sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")]).returncode == 0
    assert (tmp_path / "run" / "figures" / "geometry.png").is_file()
