"""A zoo of image files: pixels equal those of each family's HF image processor; what is no image is refused."""

import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from icet_jax.data.prepared import PreparedImage, write_set
from icet_jax.data.records import Example, Records
from icet_jax.errors import UserError
from icet_jax.media.image_files import ImageFiles
from icet_jax.media.images import image_size, open_image
from icet_jax.models.base.processor import load_processor
from tests import tiny_families, tiny_qwen, tiny_smolvlm
from tests.media.test_images import png
from tests.models import by_hand as tiled_by_hand
from tests.models import processor_families as families

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")
SIZE = 28
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(mode="RGB", height=41, width=57):
    channels = {"RGBA": 4, "CMYK": 4, "LA": 2}.get(mode, 3)
    if mode in ("L", "1"):
        return Image.fromarray(noise(height, width)[..., 0]).convert(mode)
    if mode == "P":
        return Image.fromarray(noise(height, width)).quantize(32)
    if mode == "I;16":
        return Image.fromarray(noise(height, width)[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(noise(height, width, channels), mode if mode == "CMYK" else None)


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


FRAMES = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue", "green")]
MOVING = {"save_all": True, "append_images": FRAMES[1:], "duration": 50}

# name: (image, file's suffix, how it is saved)
ZOO = {
    "RGB jpeg": (picture(), "jpg", {"quality": 90}),
    "RGB jpeg, progressive, subsampled": (picture(), "jpg", {"progressive": True, "subsampling": 2}),
    "RGB png": (picture(), "png", {}),
    "RGB png, interlaced text": (picture(), "png", {"compress_level": 9}),
    "RGBA png": (picture("RGBA"), "png", {}),
    "LA png": (picture("LA"), "png", {}),
    "palette": (picture("P"), "png", {}),
    "palette with a transparent entry": (picture("P"), "png", {"transparency": 3}),
    "palette with transparencies": (picture("P"), "png", {"transparency": bytes(range(0, 256, 8))}),
    "RGB with a transparent colour": (picture(), "png", {"transparency": (1, 2, 3)}),
    "CMYK jpeg": (picture("CMYK"), "jpg", {}),
    "CMYK tiff": (picture("CMYK"), "tif", {}),
    "greyscale jpeg": (picture("L"), "jpg", {}),
    "greyscale png": (picture("L"), "png", {}),
    "bilevel": (picture("1"), "png", {}),
    "16 bit png": (picture("I;16"), "png", {}),
    "16 bit tiff": (picture("I;16"), "tif", {}),
    "float tiff": (Image.fromarray(noise(20, 30)[..., 0].astype(np.float32)), "tif", {}),
    "YCbCr tiff": (picture().convert("YCbCr"), "tif", {}),
    "LAB tiff": (picture().convert("LAB"), "tif", {}),
    **{f"EXIF orientation {o}": (picture(), "jpg", rotated(o)) for o in range(2, 9)},
    "EXIF orientation in png": (picture(), "png", rotated(6)),
    "EXIF orientation that is none": (picture(), "jpg", rotated(99)),
    "animated gif": (FRAMES[0], "gif", MOVING),
    "animated webp": (FRAMES[0], "webp", MOVING | {"lossless": True}),
    "animated png": (FRAMES[0], "png", MOVING),
    "tiff of many pages": (FRAMES[0], "tif", {"save_all": True, "append_images": FRAMES[1:]}),
    "webp": (picture(), "webp", {"quality": 80}),
    "bmp": (picture(), "bmp", {}),
    "one pixel": (Image.new("RGB", (1, 1), (9, 99, 199)), "png", {}),
    "one grey pixel": (Image.new("L", (1, 1), 7), "png", {}),
    "one column": (picture(height=90, width=1), "png", {}),
    "wide": (picture(height=3, width=200), "png", {}),
    "exactly the model's size": (picture(height=SIZE, width=SIZE), "png", {}),
    "one pixel short": (picture(height=SIZE - 1, width=SIZE), "png", {}),
    "large": (picture(height=700, width=901), "jpg", {}),
}
ANIMATED = {name for name in ZOO if "animated" in name or "many pages" in name}


@pytest.fixture(scope="module", params=(*families.FAMILIES, "smolvlm", "qwen2_5_vl"))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def processor(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny = {"smolvlm": tiny_smolvlm, "qwen2_5_vl": tiny_qwen}.get(family)
    if tiny is None:
        return families.processor(folder, family)
    config = tiny.config()
    tiny.save_processor(folder, config)
    (folder / "config.json").write_text(json.dumps(tiny.hub_config(config)))
    return load_processor(folder)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """{name: file}."""
    folder, files = tmp_path_factory.mktemp("zoo"), {}
    for number, (name, (image, suffix, options)) in enumerate(ZOO.items()):
        files[name] = folder / f"{number}.{suffix}"
        image.save(files[name], **options)
    return files


def pixels(processor, source):
    return processor(images=[source], prompts=["x"])["pixel_values"]


def hf_pixels(family, image):
    """HF's image processor, made from the toy's numbers."""
    from transformers import CLIPImageProcessorPil

    square = {"height": SIZE, "width": SIZE}
    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square)
    elif family == "llava_next":
        images = tiny_families.next_processor(tiny_families.llava_next_config()).image_processor
    elif family == "smolvlm":
        images = tiny_smolvlm.processor(tiny_smolvlm.config()).image_processor
    elif family == "qwen2_5_vl":
        images = tiny_qwen.processor(tiny_qwen.config()).image_processor
    else:
        images = tiny_families.mllama_processor(tiny_families.mllama_config()).image_processor
    return images(image, return_tensors="np")["pixel_values"]


def by_hand(family, path):
    """What the image processor does, without it."""
    from transformers.image_transforms import convert_to_rgb
    from transformers.image_utils import load_image

    if family == "llava":
        return clip_by_hand(path)
    image = convert_to_rgb(load_image(str(path)))
    if family == "qwen2_5_vl":
        return qwen_by_hand(image)
    if family == "llava_next":
        return tiled_by_hand.llava_next(image, tiny_families.PINPOINTS, SIZE)[None]
    tiles, _ = tiled_by_hand.mllama(image, tiny_families.RATIOS, SIZE)
    return np.pad(tiles, ((0, 4 - len(tiles)), *[(0, 0)] * 3))[None, None]


def qwen_by_hand(image):
    """Groups of 2 x 2 patches in row-major order; a patch has its pixels twice, as two frames."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    limits = tiny_qwen.LIMITS["min_pixels"], tiny_qwen.LIMITS["max_pixels"]
    high, wide = smart_resize(image.height, image.width, tiny_qwen.SIDE, *limits)
    array = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC)).transpose(2, 0, 1) * (1 / 255)
    mean, std = (np.array(row, np.float32)[:, None, None] for row in (CLIP_MEAN, CLIP_STD))
    array = ((array.astype(np.float32) - mean) / std).astype(np.float32)
    patches = []
    for top in range(0, high, tiny_qwen.SIDE):
        for left in range(0, wide, tiny_qwen.SIDE):
            for row, column in ((0, 0), (0, 4), (4, 0), (4, 4)):
                patch = array[:, top + row : top + row + 4, left + column : left + column + 4]
                patches.append(np.stack([patch, patch], axis=1).ravel())
    return np.stack(patches)


def clip_by_hand(path):
    """What CLIPImageProcessor did before it had backends, out of transformers' own parts."""
    from transformers import image_transforms as transforms
    from transformers.image_utils import ChannelDimension, PILImageResampling, load_image

    image = np.asarray(transforms.convert_to_rgb(load_image(str(path))))
    height, width = transforms.get_resize_output_image_size(
        image, size=SIZE, default_to_square=False, input_data_format=ChannelDimension.LAST
    )
    image = transforms.resize(image, (height, width), PILImageResampling.BICUBIC, input_data_format="channels_last")
    image = transforms.center_crop(image, (SIZE, SIZE), input_data_format=ChannelDimension.LAST)
    image = transforms.rescale(image, 1 / 255, input_data_format=ChannelDimension.LAST)
    image = transforms.normalize(image, CLIP_MEAN, CLIP_STD, input_data_format=ChannelDimension.LAST)
    return np.moveaxis(image, -1, 0)[None]


@pytest.mark.parametrize("name", ZOO)
def test_pixels_of_the_zoo_equal_hf(name, zoo, family, processor):
    from transformers.image_utils import load_image

    ours = pixels(processor, zoo[name])
    np.testing.assert_array_equal(ours, hf_pixels(family, load_image(str(zoo[name]))))
    if family != "smolvlm":  # its tiles are compared in tests/models/test_smolvlm_processor.py
        np.testing.assert_array_equal(ours, by_hand(family, zoo[name]))
    np.testing.assert_array_equal(ours, pixels(processor, zoo[name].read_bytes()))


def late_turn():
    """A PNG file that is to be turned by what stands after its pixels."""
    image, exif = picture(), Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + body
    plain = saved(image, "PNG")
    end = plain.rindex(b"IEND") - 4
    return plain[:end] + len(body).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + plain[end:]


def test_sizes_from_headers_are_those_of_the_decoded_images(zoo):
    files = {**zoo, "late turn": late_turn(), "array": noise(5, 8), "in memory": picture("RGBA")}
    for name, source in files.items():
        image = open_image(source)
        assert image_size(source) == (image.height, image.width), name
    assert image_size(files["late turn"]) == (57, 41)


def test_a_prompt_is_measured_without_decoding_its_image(zoo, family, processor, monkeypatch):
    from PIL import ImageFile

    files = [zoo[name] for name in zoo if zoo[name].suffix in (".jpg", ".png", ".webp")]
    expected = [processor(images=[file], prompts=["x"])["attention_mask"].sum() for file in files]

    def decoded(self):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    assert [len(ids) for ids in processor.token_ids(files, ["x"] * len(files))] == expected
    if family in ("llava", "mllama"):
        assert processor.token_ids(["/not/looked/at.png"], ["x"])


def test_prepared_images_have_the_same_pixels_and_are_counted_alike(zoo, processor, tmp_path):
    rows = [Example(name, "placeholder", (path,)) for name, path in zoo.items()]
    write_set(tmp_path, "zoo", Records("zoo", rows, []), {"source": "zoo", "limit": None, "fingerprint": ""})
    for number, path in enumerate(zoo.values()):
        image = PreparedImage(tmp_path / "zoo", number, "image")
        assert image.read() == path.read_bytes()
        np.testing.assert_array_equal(pixels(processor, image), pixels(processor, path))


@pytest.mark.parametrize("decode", [False, True])
def test_every_animal_may_be_used_and_animated_ones_are_counted(zoo, decode):
    files = ImageFiles(decode=decode)
    assert [files.problem(path) for path in zoo.values()] == [None] * len(zoo)
    assert {name for name in zoo if zoo[name] in files.animated} == ANIMATED


@pytest.mark.parametrize("name", ["animated gif", "animated webp", "animated png"])
def test_the_first_frame_is_used(name, zoo, processor):
    np.testing.assert_array_equal(pixels(processor, zoo[name]), pixels(processor, FRAMES[0]))


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# name: (content, what opening it says, what looking at it without decoding finds)
NO_IMAGES = {
    "text": (b"this is no image", "not an image", "not an image"),
    "empty": (b"", "not an image", "not an image"),
    "html": (b"<html><body>404</body></html>", "not an image", "not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image", "not an image"),
    "truncated jpeg": (saved(picture(), "JPEG")[:-200], "truncated or damaged", None),
    "truncated png": (saved(picture(), "PNG")[:-200], "truncated or damaged", None),
    "truncated gif": (saved(picture("P"), "GIF")[:300], "truncated or damaged", None),
    "header alone": (saved(picture(), "PNG")[:40], "not an image", "not an image"),
    "half a header": (saved(picture(), "PNG")[:20], "cannot be read|not an image", "not an image"),
    "bomb": (png(60_000, 60_000), "too large to be decoded safely", "damaged image"),
    "no pixels at all": (png(0, 0), "cannot be read|not an image", "not an image"),
    "too long and thin": (saved(Image.new("L", (1, 800)), "PNG"), "too long and thin", None),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_refused_in_one_line(name, processor, tmp_path):
    content, says, reason = NO_IMAGES[name]
    path = tmp_path / "animal.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        pixels(processor, path)
    assert "animal.png" in str(caught.value) and "\n" not in str(caught.value)
    found = ImageFiles().problem(path)
    assert (found and found[0]) == reason
    decoded = ImageFiles(decode=True).problem(path)
    assert decoded is not None and decoded[0] == (reason or "damaged image") and "animal.png" in decoded[1]
