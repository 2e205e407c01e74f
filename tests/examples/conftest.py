"""The miniature parts of examples/real_vlm, and a LLaVA made of them."""

import csv
import json

import pytest

from examples.real_vlm import assemble, dinov2, smollm2
from tests.examples import real_parts


@pytest.fixture(scope="session")
def llama():
    return real_parts.llama()


@pytest.fixture(scope="session")
def vit():
    return real_parts.dinov2()


@pytest.fixture(scope="session")
def gguf(tmp_path_factory, llama):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    real_parts.write_gguf(path, llama)
    return path


@pytest.fixture(scope="session")
def onnx(tmp_path_factory, vit):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    real_parts.write_onnx(path, vit)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return real_parts.photographs(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory, gguf, onnx):
    folder = tmp_path_factory.mktemp("llava")
    tower = dinov2.to_clip(dinov2.read_dinov2(onnx), 28)
    sizes = assemble.write_llava(folder, smollm2.read_decoder(gguf), tower, seed=0)
    assert sizes["image_tokens"] == 4
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, pictures):
    """Options that name the miniatures: captions, images, instructions, forbidden requests (placeholders)."""
    folder = tmp_path_factory.mktemp("inputs")
    with (folder / "red.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "question", "policy", "from"))
        writer.writerows((number, f"placeholder request {number}", f"policy {number % 3}", "") for number in range(40))
    instructions = [{"instruction": f"Name {number} things."} for number in range(24)]
    instructions += [{"instruction": "name  3 THINGS."}, {"instruction": "x" * 500}, {"instruction": "see <image>"}]
    (folder / "instructions.json").write_text(json.dumps(instructions))
    return {
        "captions": pictures[0], "images": pictures[1], "instructions": folder / "instructions.json",
        "forbidden": folder / "red.csv",
    }  # fmt: skip
