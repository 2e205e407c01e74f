"""The markup of parts of a page."""

import base64
import gzip
import json
import re

from icet_jax.report.page import environment

_PACKED = re.compile(r'<script type="text/plain" id="transcript-data">([^<]*)</script>')


def html(blocks):
    """Blocks as the page has them."""
    return str(environment().get_template("blocks.html").module.blocks(blocks))


def transcript_data(page):
    """The transcripts that a page unpacks; None for a page without any."""
    packed = _PACKED.search(page)
    return None if packed is None else json.loads(gzip.decompress(base64.b64decode(packed[1])))


def unpacked(page):
    """All text that a page holds: its markup, and the transcripts that it unpacks."""
    return page + json.dumps(transcript_data(page), ensure_ascii=False)
