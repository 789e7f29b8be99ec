"""Images in data URLs: their forms, and what a hostile one costs."""

from __future__ import annotations

import base64
import re
import sys
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import pytest

from xfm_fast.serve.images import decode_base64
from xfm_fast.serve.schema import Problem


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])
def test_percent_encoding_is_read(encode: Any, lower: bool) -> None:
    content = bytes(range(256)) * 3 + b"\xff\xfb\xff"
    text = quote(encode(content), safe="")
    if lower:
        text = re.sub("%..", lambda found: found[0].lower(), text)
    assert "%2b" in text.lower()
    assert decode_base64(f"data:image/png;base64,{text}", "image") == content


@pytest.mark.parametrize("escape", ["%41", "%2B", "%", "%3d%0A"])
def test_the_work_on_escapes_does_not_grow_with_their_number(escape: str) -> None:
    """An escape costs no line of Python: 30 MB of them took six seconds."""

    def lines(count: int) -> int:
        number = 0

        def trace(*_: object) -> Any:
            nonlocal number
            number += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with suppress(Problem):
                decode_base64(f"data:image/png;base64,{escape * count}", "image")
        finally:
            sys.settrace(before)
        return number

    assert lines(4000) == lines(40)
