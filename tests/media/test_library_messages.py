"""Messages of Pillow and transformers that mean nothing are not shown; others are."""

import io
import json
import logging
import warnings

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from icet_jax import main
from icet_jax.errors import UserError
from icet_jax.media import library_messages
from icet_jax.media.images import open_image
from icet_jax.media.tokenizer import load_tokenizer

RGB = Image.new("RGB", (30, 20))


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated(cut):
    """A JPEG file whose EXIF data lack their last bytes."""
    exif = RGB.getexif()
    exif[0x0112] = 6
    return saved(RGB, "JPEG", exif=exif.tobytes()[:-cut])


def several():
    """A JPEG file that says it has further pictures, and does not say where."""
    data = saved(RGB, "JPEG")
    mpf = b"MPF\0" + b"II*\0\x08\0\0\0" + b"\xff" * 6
    return data[:2] + b"\xff\xe2" + (len(mpf) + 2).to_bytes(2, "big") + mpf + data[2:]


PICTURES = {
    "palette": lambda: saved(Image.linear_gradient("L").quantize(4), "PNG", transparency=bytes(range(4))),
    "huge": lambda: saved(Image.new("1", (12_000, 9_000)), "PPM"),
    "exif": lambda: rotated(6),
    "several": several,
}


def said(picture, silence):
    """The warnings of opening a picture."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        if silence:
            library_messages.quiet_pillow()
        try:
            assert open_image(picture).mode == "RGB"
        except UserError as error:
            assert "too large to be decoded safely (12000 x 9000 pixels)" in str(error)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", PICTURES)
def test_pillow_is_quiet_about_a_picture_that_is_opened_or_refused(name):
    picture = PICTURES[name]()
    assert len(said(picture, silence=False)) > 0, "Pillow no longer says anything: remove the entry"
    assert said(picture, silence=True) == []


def test_other_warnings_of_pillow_are_shown():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        library_messages.quiet_pillow()
        warnings.warn_explicit("is deprecated", DeprecationWarning, "Image.py", 1, module="PIL.Image")
        warnings.warn_explicit("something else", UserWarning, "Image.py", 2, module="PIL.Image")
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "mine.py", 3, module="mine")
    assert len(caught) == 3


def test_every_command_is_quiet_about_pictures(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(library_messages, "quiet_pillow", lambda: called.append(True))
    with pytest.raises(UserError):
        main.run(["labels", f"--workdir={tmp_path / 'gone'}"])
    assert called


@pytest.fixture
def lines(monkeypatch):
    """What transformers logs."""
    from transformers.utils import logging as theirs

    handler = logging.Handler()
    lines = []
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    theirs.warning_once.cache_clear()
    yield lines
    logging.getLogger("transformers").removeHandler(handler)
    theirs.warning_once.cache_clear()


def byte_pairs(folder):
    """Writes a tokenizer of letters, with settings as published tokenizers have them, and loads it."""
    letters = {letter: number for number, letter in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    words = Tokenizer(models.BPE(letters, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<s>", "model_max_length": 8}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"clean_up_tokenization_spaces": True}))
    return load_tokenizer(folder)


def test_transformers_is_quiet_about_long_texts_and_clean_up(tmp_path, lines):
    tokenizer = byte_pairs(tmp_path)
    ids = tokenizer("more than eight letters .")["input_ids"]
    assert len(ids) == 25 and tokenizer.decode(ids) == "more than eight letters ."
    assert lines == []


def test_other_lines_of_transformers_are_shown(tmp_path, lines):
    byte_pairs(tmp_path)
    logging.getLogger("transformers.tokenization_utils_base").warning("something else")
    assert lines == ["something else"]


def test_tqdm_is_quiet_in_a_notebook_without_widgets():
    from tqdm import TqdmWarning
    from tqdm.notebook import WARN_NOIPYW

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        library_messages.quiet_transformers()
        warnings.warn(WARN_NOIPYW, TqdmWarning, stacklevel=1)
    assert caught == []
