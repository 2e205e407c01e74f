"""The miniature parts of examples/real_vlm, and a LLaVA made of them."""

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
