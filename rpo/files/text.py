r"""The one way in which text is read and written: UTF-8, whatever the machine's own encoding is.

Text is refused, not repaired: a byte that is no UTF-8 would become a wrong caption that is trained on. Byte order marks
are dropped. Lines end with `\n` or `\r\n` only: the other separators of Unicode occur inside captions.
"""

import codecs
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from rpo.errors import InputError

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_WINDOWS_ONLY = range(0x80, 0xA0)  # letters and quotation marks in Windows-1252, control codes in Latin-1
_ASCII, _HALF = 0x7F, 2


def read_text(path: str | Path) -> str:
    r"""The whole text of a UTF-8 file, without a byte order mark, its lines ending with `\n`."""
    return decode_text(Path(path).read_bytes(), str(path)).replace("\r\n", "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file as UTF-8 with the line ends that the text has."""
    Path(path).write_bytes(text.encode("utf-8"))


def lines(text: str) -> list[str]:
    r"""The lines of a text without their ends; one that the text ends with makes no line of its own.

    Example:
        >>> lines("a poster\u2028of a fox\r\ntwo dogs\n")
        ['a poster\u2028of a fox', 'two dogs']
    """
    found = text.split("\n")
    whole = found if found[-1] else found[:-1]
    return [line.removesuffix("\r").removeprefix("\ufeff") for line in whole]  # files that were joined keep a mark each


def read_lines_of(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, read as it is asked for."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decode_text(line, str(path), first_line=number)
            yield number, (lines(text) or [""])[0]  # of a mark alone nothing is left


def decode_text(data: bytes, name: str, *, first_line: int = 1) -> str:
    """The text that bytes hold."""
    try:
        if (at := data.find(b"\0")) < 0:
            return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start
    column = at - data.rfind(b"\n", 0, at)
    line = first_line + data.count(b"\n", 0, at)
    raise InputError(f"{name}, line {line}, byte {column}: {_explained(data, at, name)}")


def text_fault(text: str) -> str:
    """Why a text cannot be a caption, whatever it says; empty if it can."""
    if "\0" in text:
        return "holds a NUL character"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half of a surrogate pair, which is no character"
    return ""


def encodable(text: str) -> str:
    r"""A text that is shown or kept as evidence, with halves of surrogate pairs written out, as in "\ud800"."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _explained(data: bytes, at: int, name: str) -> str:
    encoding = _likely_encoding(data)
    if not data[at] and not encoding.startswith("UTF"):
        return "a NUL byte; expected text in UTF-8; look at what wrote the file, or take another one"
    what = encoding or "in the encoding of another script (GB18030, Shift_JIS, …)"
    code = encoding.split()[0].upper() if encoding else "ENCODING"
    return (
        f"the text is not UTF-8; it seems to be {what}; expected UTF-8; convert it: "
        f"iconv -f {code} -t UTF-8 '{name}' > new, or save it as UTF-8 in an editor"
    )


def _likely_encoding(data: bytes) -> str:
    """The encoding that bytes seem to have that are not UTF-8; empty if nothing is likely."""
    if marked := [encoding for mark, encoding in _MARKS.items() if data.startswith(mark)]:
        return marked[0]
    nuls = data.count(0)
    for encoding, zeros in (("UTF-16LE", data[1::2]), ("UTF-16BE", data[::2])):
        if nuls and zeros.count(0) == nuls and nuls * _HALF > len(zeros):
            return encoding
    pairs = sum(one > _ASCII and other > _ASCII for one, other in pairwise(data))
    if nuls or pairs * _HALF > sum(byte > _ASCII for byte in data):
        return ""  # letters beyond ASCII follow each other, as they hardly do in a language of Latin letters
    return "Windows-1252" if any(byte in _WINDOWS_ONLY for byte in data) else "Windows-1252 or ISO-8859-1"
