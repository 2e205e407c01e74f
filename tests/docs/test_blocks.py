"""Every command, field, name, file and code block of the README and the docs; and that the check finds wrong ones."""

import ast

import numpy as np
import pytest
from PIL import Image

from icet_jax import miniatures as toy
from icet_jax.main import MODES
from tests.docs import blocks
from tests.docs.blocks import Block, Wrong

PAGES = blocks.pages()
CODE = [page for page in PAGES if any(block.kind in blocks.PYTHON for block in blocks.blocks(page.read_text("utf-8")))]
SCRIPTS = [
    path for folder in ("configs", "benchmarks", "scripts", "launch") for path in (blocks.ROOT / folder).glob("*.py")
]
SCRIPTS += [blocks.ROOT / f"icet_jax/{name}.py" for name in ("main", "organism/build", "miniatures/__init__")]
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(blocks.ROOT)))


@names
def test_what_a_page_tells_to_type_starts_and_what_it_names_is_there(page):
    assert list(blocks.problems(page)) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(blocks.ROOT)))
def test_what_a_script_or_config_says_about_itself_starts(script):
    for block in blocks.blocks(ast.get_docstring(ast.parse(script.read_text("utf-8"))) or ""):
        blocks.check_block(block)


@names
def test_links_between_files_lead_somewhere(page):
    assert list(blocks.broken_links(page)) == []


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA-1.5 of toy size with the published one's 24 exits."""
    return toy.checkpoint("llava15", tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("page", CODE, ids=lambda page: str(page.relative_to(blocks.ROOT)))
def test_python_of_a_page_runs(page, llava, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cat.png")
    stand_ins = {
        "llava-hf/llava-1.5-7b-hf": str(llava),
        ', revision="COMMIT", adapter="DIR"': "",
        "max_new_tokens=64": "max_new_tokens=4",
    }
    blocks.run_python(page, tmp_path, stand_ins)


MAIN = "python -m icet_jax.main"


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("sh", f"{MAIN} --config=configs/organism_lpo.py --workdir=runs/a", "no such file"),
        ("sh", f"{MAIN} --config=configs/organism_lppo.py", "needs --workdir"),
        ("sh", f"{MAIN} --config=configs/organism_lppo.py --workdir=a --config.lppo.klcoef=0.1", "nearest is"),
        ("sh", f"{MAIN} --config=configs/organism_lppo.py --workdir=a \\\n  --config.lppo.gamma=2", "between 0 and 1"),
        ("sh", f"{MAIN} --mode=sweeep --config=configs/llava15_sweep.py --workdir=a", "sweeep"),
        ("sh", f"{MAIN} --config=configs/llava15_lppo.py:14b --workdir=a", "variant '14b'"),
        ("sh", f"{MAIN} --mode=labels --workdir=RUN --out=a.csv [--rows=many]", "many"),
        ("sh", "icet-jax sweeep --config=configs/llava15_sweep.py --workdir=a", "did you mean sweep?"),
        ("sh", "icet-jax sweep --config=configs/llava15_sweep.py", "needs --workdir"),
        ("sh", "icet-jax", "starts no mode"),
        ("sh", "icet-jax --mode=plan --topologie=v5e:4x4 --config=configs/llava15_lppo.py", "topologie"),
        ("sh", "python benchmarks/ablation.py --out runs/a", "there is no benchmarks/ablation.py"),
        ("sh", "python benchmarks/ablations.py --outt runs/a", "no --outt"),
        ("sh", "python launch/local_processes.py -- --config=configs/none.py --workdir=a", "no such file"),
        ("sh", "benchmarks/run_all.sh --parts=1", "no --parts"),
        ("sh", "launch/tpu_pod.sh TPU ZONE --config=configs/llava15_lppo.py --workdr=a", "workdr"),
        ("sh", "sbatch --nodes=2 launch/slurm.sh --config=configs/llava15_lppo.py", "starts nothing of launch/"),
        ("sh", "python -m pytest tests/nowhere", "there is no tests/nowhere"),
        ("sh", f"{MAIN} --mode=ask --checkpoint=DIR --image=examples/none.png --prompt=what", "no examples/none.png"),
        ("sh", "make dmo", "no dmo"),
        ("sh", "pip install -e '.[cuda11]'", "no extra cuda11"),
        ("sh", "git clone there && rm -rf here", "rm is neither ours"),
        ("sh", 'echo "half', "No closing quotation"),
        ("", f"{MAIN} --config=configs/organism_lppo.py", "needs --workdir"),
        ("python", "import icet_jax\nvlm = icet_jax.load(", "does not compile"),
        ("shell", "make demo", "fenced as one of"),
    ],
)
def test_a_wrong_block_is_found(kind, text, says):
    with pytest.raises(Wrong) as wrong:
        blocks.check_block(Block(kind, text, 1))
    assert says in str(wrong.value)


@pytest.mark.parametrize(
    ("span", "says"),
    [
        ("config.lppo.kl_coeff", "not a field"),
        ("--config.lppo.exits=random", "one of fixed"),
        ("--mode=swep", "no mode swep"),
        ("icet_jax.algorithms.losses.polcy_loss", "has no polcy_loss"),
        ("icet_jax/algorithms/loss.py", "there is no"),
        ("configs/llava15_{lppo,swep}.py", "configs/llava15_swep.py"),
        (f"{MAIN} --mode=ask --config=configs/nothing.py --image=a.png", "no such file"),
    ],
)
def test_a_wrong_word_is_found(span, says):
    with pytest.raises(Wrong, match=says):
        blocks.check_span(span)


@pytest.mark.parametrize(
    ("kind", "text", "mark", "says"),
    [
        ("text", "def gae(", "from: icet_jax/algorithms/losses.py", r"does not have 'def gae\('"),
        (
            "text",
            "import jax\nimport jax.numpy as jnp\nimport jax",
            "from: icet_jax/algorithms/advantages.py",
            "this order",
        ),
        ("csv", "prompt,image,kind\na,b.png,harmless", "rows", "no usable row"),
        ("csv", "prompt,image,kind\na,b.png,vqa\nb,b.png,benign", "rows", "left out"),
    ],
)
def test_a_wrong_excerpt_or_row_is_found(kind, text, mark, says):
    with pytest.raises(Wrong, match=says):
        blocks.check_block(Block(kind, text, 1, mark))


def test_right_blocks_and_words_pass():
    text = (
        f"XLA_FLAGS=--a=8 {MAIN} --config=configs/llava15_lppo.py:smoke --workdir=runs/two [--config.seed=1]  # a # b"
    )
    blocks.check_block(Block("sh", text, 1))
    for mode in MODES.values():
        blocks.check_block(Block("sh", f"icet-jax {mode.example}", 1))
    blocks.check_block(Block("sh", f"icet-jax --version\n{MAIN} plan --help\nicet-jax --fields=lppo", 1))
    blocks.check_block(
        Block("sh", "NAME=run launch/gke_jobset.sh --config=configs/llava15_lppo.py --workdir=/runs/a", 1)
    )
    blocks.check_block(
        Block("text", "def gae(\n    mask = jnp.asarray(mask, bool)", 1, "from: icet_jax/algorithms/advantages.py")
    )
    blocks.check_block(Block("csv", 'prompt,image,kind,answer\n"a, b",c/d.png,vqa,cat', 1, "rows"))
    for span in (
        "config.lppo.kl_coef",
        "--config.sweep.exits=1,12",
        "icet_jax.vlm.VLM.generate",
        "algorithms/losses.py",
    ):
        blocks.check_span(span)


def test_blocks_are_found_whatever_stands_around_them(tmp_path):
    text = (
        "text\n\n    python x\n\n    y\n\n```sh\na\n\nb\n```\n<!-- no-run: a GPU -->\n~~~python\n```\n~~~\n\n- item\n"
    )
    found = blocks.blocks(text)
    assert [(block.kind, block.text, block.line, block.mark) for block in found] == [
        ("", "python x\n\ny\n", 3, ""),
        ("sh", "a\n\nb", 8, ""),
        ("python", "```", 14, "no-run"),
    ]


def test_wrong_links_and_failing_code_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# A Heading: `x`, (here)\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n[a](there.md) [b](there.md#a-heading-x-here) [c](#top) [d](https://example.org/x)\n"
        "[e](gone.md) [f](there.md#b) `[g](gone.md)` [h](../outside.md)\n\n```python\nvalue = 1\n```\n"
        "```python\nassert value == 2, 'two'\n```\n",
        encoding="utf-8",
    )
    (tmp_path.parent / "outside.md").touch()
    assert [line.split(": ", 1)[1] for line in blocks.broken_links(page, tmp_path)] == [
        "gone.md leads nowhere",
        "there.md has no heading #b",
        "../outside.md leads nowhere",
    ]
    with pytest.raises(Wrong, match=r"page.md:9: AssertionError: two"):
        blocks.run_python(page, tmp_path, {})
