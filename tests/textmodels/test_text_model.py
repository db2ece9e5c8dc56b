"""Files are text or say why not; a shorter text has the bytes of its own tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from truemask.textmodels.opening import open_model
from truemask.textmodels.text_model import TextModelError, read_text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"ab\xffc", r"not text in UTF-8: byte 2 is 0xff"),
        (b"abc\0", "not text: byte 3 is 0"),
        (None, "there is no file"),
    ],
)
def test_what_is_no_text(content: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TextModelError, match=says):
        read_text(file)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextModelError, match="it is a folder"):
        read_text(tmp_path)


def test_bytes_are_those_of_the_tokens(run: Path, llama: Path) -> None:
    text = "at café the"
    by_bytes, by_words = open_model(str(run)).tokens(text), open_model(str(llama)).tokens(text)
    assert by_bytes.judged_bytes == len(text.encode())
    assert by_words.judged_bytes == len(text.encode()) - len("at")  # the first token is read, not judged
    assert by_bytes.first(4).judged_bytes == 3
    assert by_words.first(3).judged_bytes == len(" c")
