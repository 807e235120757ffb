"""Reads a file's text: plain text, Markdown and HTML. Refuses any other file with a reason."""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

MAX_BYTES = 1_000_000
PART = 24_000
"""Most characters of a text in one model call: some 6,000 to 8,000 tokens."""


_GONE, _DENIED = "there is no such file any more", "this worker has no permission to read it"
_WHY = {errno.ENOENT: _GONE, errno.ENOTDIR: _GONE, errno.ELOOP: _GONE, errno.EACCES: _DENIED, errno.EPERM: _DENIED}
_WHY |= dict.fromkeys((errno.EISDIR, errno.ENXIO), "it is a folder, a pipe or a device, not a file")
_WHY |= {errno.ENAMETOOLONG: "its path is too long for this system"}
"""Errors that a retry does not change; any other error of a disk or a share may be temporary."""


class Unreadable(Exception):
    """This file's text cannot be read. The message says why."""


@dataclass(frozen=True)
class Document:
    text: str
    sha256: str
    """Digest of the file's bytes, in hex."""
    bytes: int
    kind: str
    """`text` or `html`."""
    encoding: str


def address(path: Path) -> str:
    """Returns the path as text for `located`: unchanged, or as a `file:` URL when its name is not valid Unicode."""
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        return f"file://{quote_from_bytes(os.fsencode(path))}"


def located(address: str) -> Path:
    """Returns the path of a `file:` URL, or of a path as text."""
    return Path(os.fsdecode(unquote_to_bytes(address[7:])) if address.startswith("file:///") else address)


def read_document(path: Path) -> Document:
    """Reads a document. Raises Unreadable when it is not readable as text, OSError for a possibly temporary error."""
    try:
        raw = _read(path)
    except OSError as error:
        if error.errno in _WHY:
            raise Unreadable(_WHY[error.errno]) from None
        raise
    except ValueError:
        raise Unreadable("its path is not valid") from None
    text, encoding = decode(raw)
    kind = "html" if _is_html(path, text) else "text"
    text = tidy(html_text(text) if kind == "html" else text)
    if not text:
        raise Unreadable("the file is empty")
    return Document(text, sha256(raw).hexdigest(), len(raw), kind, encoding)


def _read(path: Path) -> bytes:
    # Non-blocking, because a pipe may never have a writer. Only up to the limit, because a device has no end.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise Unreadable(_WHY[errno.EISDIR])
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise Unreadable(f"the file has {max(about.st_size, len(raw)):,} bytes, and at most {MAX_BYTES:,} are read")
    return raw


def decode(raw: bytes) -> tuple[str, str]:
    """Returns the text and its encoding: UTF-8, UTF-16 with a byte order mark, else Windows-1252. Raises Unreadable."""
    if raw.startswith(b"%PDF"):
        raise Unreadable("it is a PDF, and no reader for those is installed; convert it to text")
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if raw.startswith(mark):
            return _decoded(raw, encoding)
    if b"\0" in raw:
        raise Unreadable("it is not text but a binary file")
    try:
        return raw.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError:
        return _decoded(raw, "windows-1252")


def _decoded(raw: bytes, encoding: str) -> tuple[str, str]:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(f"it cannot be decoded, neither as UTF-8 nor as {encoding} (byte {error.start})") from None
    odd = sum(unicodedata.category(each) == "Cc" and each not in "\n\r\t\f" for each in text)
    if odd > len(text) // 100:
        raise Unreadable("it is not text but a binary file")
    return text, encoding


def tidy(text: str) -> str:
    """Returns the text with one kind of line end, no trailing spaces, and at most two blank lines in a row."""
    lines = (line.rstrip() for line in re.sub(r"\r\n?|\f", "\n", unicodedata.normalize("NFC", text)).split("\n"))
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip()


def parts(text: str, size: int = PART) -> list[str]:
    """Splits the text into parts of at most `size` characters, between paragraphs if possible."""
    found, rest = [], text
    while len(rest) > size:
        window = rest[:size]
        cut = max(window.rfind("\n\n"), 0) or max(window.rfind("\n"), 0) or max(window.rfind(" "), 0) or size
        if cut < size // 2:  # a paragraph longer than half a part: cut within it
            cut = max(window.rfind("\n"), window.rfind(" "), size // 2)
        found.append(rest[:cut].strip())
        rest = rest[cut:]
    return [each for each in (*found, rest.strip()) if each]


# ------------------------------------------------------------------ folders


def files(folder: Path, but: Path) -> Iterator[Path]:
    """Yields the files below a folder, without hidden files, links and the contents of the folder `but`.

    For a folder that can never be read, it yields the folder itself. Raises OSError for an error that may be temporary.
    """
    todo = [folder]
    while todo:
        here = todo.pop()
        try:
            with os.scandir(here) as found:
                entries = [each for each in found if not each.name.startswith(".")]
        except FileNotFoundError:
            continue  # gone since its parent was read
        except OSError as error:
            if error.errno not in _WHY:
                raise
            yield here
            continue
        todo += [here / each.name for each in entries if each.is_dir(follow_symlinks=False) and here / each.name != but]
        yield from (here / each.name for each in entries if each.is_file(follow_symlinks=False))


# ------------------------------------------------------------------ HTML

_LINES = {"br", "li", "td", "th", "tr"}
_BLOCKS = {"article", "aside", "blockquote", "dd", "div", "dl", "dt", "footer", "form", "header", "hr", "main", "ol"}
_BLOCKS |= {"h1", "h2", "h3", "h4", "h5", "h6", "p", "pre", "section", "table", "ul"} | _LINES
_SILENT = {"script", "style", "template", "title", "noscript"}


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._silent = 0
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in _SILENT
        self._pre += tag == "pre"
        if tag in _BLOCKS:
            self.pieces.append("\n" if tag in _LINES else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in _SILENT and self._silent > 0
        self._pre -= tag == "pre" and self._pre > 0
        if tag in _BLOCKS:
            self.pieces.append("\n" if tag in _LINES else "\n\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.pieces.append(data if self._pre else re.sub(r"\s+", " ", data))


def html_text(html: str) -> str:
    """Returns the visible text of a page, one line per block."""
    parser = _Text()
    # Comments are removed and unclosed tags become text, because the parser takes quadratic time over them.
    first, *others = html.split("<!--")
    html = first + "".join(each.partition("-->")[2] for each in others)
    parser.feed(re.sub(r"<(?![^<>]*>)", "&lt;", html))
    parser.close()
    lines = (line.strip() for line in "".join(parser.pieces).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _is_html(path: Path, text: str) -> bool:
    head = text[:500].lstrip().lower()
    return path.suffix.lower() in (".html", ".htm", ".xhtml") or head.startswith(("<!doctype html", "<html"))
