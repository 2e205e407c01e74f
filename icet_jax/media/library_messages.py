"""Silences messages of Pillow and transformers that frighten and mean nothing to users of this package.

Each entry says why. Messages that mean something are not silenced, unless a line of this package says the same.
"""

import logging
import os
import warnings

_LOGGED = (  # (logger, beginning of the message)
    # This package compares lengths with the tokenizer's and the model's limits itself, see `VLM.misfit`.
    ("transformers.tokenization_utils_base", "Token indices sequence length is longer than"),
    # transformers leaves this step out for these tokenizers, whatever the checkpoint's tokenizer_config.json says.
    ("transformers.tokenization_utils_tokenizers", "Ignoring clean_up_tokenization_spaces=True for BPE tokenizer"),
)
_OF_IMAGES = (  # (category, beginning of the message, module that warns)
    # `open_image` drops transparency, as transformers' `load_image` does.
    (UserWarning, "Palette images with Transparency expressed in bytes", r"PIL\.Image"),
    # `open_image` refuses images of fewer pixels than Pillow warns of.
    (RuntimeWarning, r"Image size \(\d+ pixels\) exceeds limit", r"PIL\.Image"),
    # Tags of EXIF and TIFF: of those that can be read, only the rotation is used.
    (UserWarning, "", r"PIL\.TiffImagePlugin"),
    # Further pictures of the file, which nobody asked for.
    (UserWarning, "Image appears to be a malformed MPO file", r"PIL\.JpegImagePlugin"),
)


class _Beginning(logging.Filter):
    """Drops log records whose message has a certain beginning."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is kept."""
        return not record.getMessage().startswith(self.name)


_FILTERS = tuple((logger, _Beginning(beginning)) for logger, beginning in _LOGGED)


def quiet_transformers() -> None:
    """Silences what transformers says about tokenizers and about itself; call it before transformers is imported."""
    # Without torch, transformers says that it cannot run models, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # In a notebook without ipywidgets, tqdm says so when transformers imports it. No bar of tqdm is shown.
    warnings.filterwarnings("ignore", message="IProgress not found")
    for name, logged in _FILTERS:
        logging.getLogger(name).addFilter(logged)


def quiet_pillow() -> None:
    """Silences what Pillow says about images that `open_image` then returns, or refuses with a line of its own.

    The filters hold in the whole process. Only the command line calls this, because a user's own program may open other
    images, too.
    """
    for category, beginning, module in _OF_IMAGES:
        warnings.filterwarnings("ignore", category=category, message=beginning, module=module)
