"""Any image a user has, with the pixels transformers sees for the same object; and clear lines for what is none."""

import io

import numpy as np
import pytest
from PIL import Image

from icet_jax.errors import UserError
from icet_jax.media.images import open_image

transformers_images = pytest.importorskip("transformers.image_utils")


def array(height=9, width=7, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def images():
    """One image of every kind that reaches a VLM."""
    palette = Image.fromarray(array()).convert("P", palette=Image.Palette.ADAPTIVE)
    transparent = palette.copy()
    transparent.info["transparency"] = 3
    return {
        "RGB": Image.fromarray(array()),
        "RGBA": Image.fromarray(array(channels=4)),
        "LA": Image.fromarray(array(channels=4)).convert("LA"),
        "L": Image.fromarray(array()[..., 0]),
        "1": Image.fromarray(array()[..., 0]).convert("1"),
        "P": palette,
        "P with transparency": transparent,
        "CMYK": Image.fromarray(array()).convert("CMYK"),
        "I;16": Image.fromarray(array()[..., 0].astype(np.uint16) * 200),
        "one pixel": Image.new("RGB", (1, 1), (1, 2, 3)),
    }


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.fromarray(array(40, 30)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("kind", list(images()))
def test_images_in_memory_look_as_they_do_to_hf(kind):
    from transformers.image_transforms import convert_to_rgb

    image = images()[kind]
    ours = open_image(image)
    assert ours.mode == "RGB"
    np.testing.assert_array_equal(ours, convert_to_rgb(image, return_numpy=True))


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "1", "P", "I;16", "one pixel"])
def test_files_look_as_they_do_to_hf(tmp_path, kind):
    path = tmp_path / "image.png"
    images()[kind].save(path)
    expected = transformers_images.load_image(str(path))
    for source in (path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(open_image(source), expected)


def test_a_rotated_photograph_is_turned_upright_as_hf_does(tmp_path):
    path = rotated(tmp_path / "photo.jpg")
    assert open_image(path).size == (40, 30)
    np.testing.assert_array_equal(open_image(path), transformers_images.load_image(str(path)))
    # An image that was opened by the caller is taken as it is, by HF too.
    assert open_image(Image.open(path)).size == (30, 40)


@pytest.mark.parametrize(
    "pixels",
    [array(), array(channels=1), array(channels=4), array().transpose(2, 0, 1), array(3, 8, 3), array(channels=4)[::2]],
)
def test_arrays_look_as_they_do_to_hf(pixels):
    from transformers.image_transforms import convert_to_rgb, to_channel_dimension_format

    expected = to_channel_dimension_format(
        convert_to_rgb(pixels, return_numpy=True), "channels_last", None if 3 in pixels.shape[::2] else "channels_last"
    )
    np.testing.assert_array_equal(open_image(pixels), expected)


def test_a_grey_array_has_no_channel_axis():
    np.testing.assert_array_equal(open_image(array()[..., 0]), array()[..., :1].repeat(3, -1))


def png(width, height):
    """A file whose header promises `width` x `height` pixels."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated():
    file = io.BytesIO()
    Image.fromarray(array(64, 64)).save(file, "JPEG")
    return file.getvalue()[:-100]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"not an image", "not an image"),
        (b"", "not an image"),
        (truncated(), "truncated or damaged"),
        (png(60_000, 60_000), "too large"),
        (png(8, 8), "truncated or damaged"),
    ],
    ids=["text", "empty", "truncated", "bomb", "no data"],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, content, complaint):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        open_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"row 3.*{complaint}"):
        open_image(content, "row 3")
    if complaint == "truncated or damaged":
        with pytest.raises(UserError, match=complaint):
            open_image(Image.open(path))


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("/no/such/file.png", "no such image file"),
        ("/", "cannot be read"),
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), "uint8"),
        (np.zeros((0, 4, 3), np.uint8), "uint8"),
        (np.zeros((9, 9, 5), np.uint8), "1, 3 or 4 channels"),
    ],
)
def test_what_is_no_image_is_named(source, complaint):
    with pytest.raises(UserError, match=complaint):
        open_image(source)
