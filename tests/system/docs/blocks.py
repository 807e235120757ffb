"""The code of README and docs: fenced blocks with the comments above them, and the commands that are named."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.dev.stack import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"^((?: *<!-- [^\n]* -->\n)*)( *)```(\w*)\n(.*?)^ *```$|^<!-- (Ctrl-C: \w+) -->$", re.MULTILINE | re.DOTALL
)
_ITEM = re.compile(r" *(?:[-*]|\d+\.) +")
_LINE = re.compile(r"^ *(?:\$ )?((?:\w+='[^']*' |\w+=\S+ )*(?:\\\n *)?uv run starter\.py(?:\\\n|.)*)$", re.MULTILINE)
_INLINE = re.compile(r"`(?:[^`\n]* )?starter\.py ([^`]+)`")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    said: dict[str, str]
    """What the comments above it say: `key: value; key: value`; a value is empty for a word alone."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """The fenced blocks of these languages, or all, and the comments that stand for a key pressed, in their order."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        comments, indent, language, code, key = found.groups()
        said: dict[str, str] = {}
        for comment in re.findall(r"<!-- (.*?) -->", comments or "") + ([key] if key else []):
            for part in comment.split("; "):
                name, _, value = part.partition(": ")
                said[name] = value
        if key or not languages or language in languages:
            code = re.sub(rf"^{indent}", "", code or "", flags=re.MULTILINE)
            yield Block(page, text.count("\n", 0, found.start()) + 1, language or "", code, said)


def code_without_a_fence(page: Path) -> Iterator[int]:
    """Lines that Markdown takes for code because they are indented. No comment can say where such code is from."""
    item = 0  # where the text of the list's item begins
    fenced, blank = False, True
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif line.strip() and not fenced:
            indent = len(line) - len(line.lstrip())
            if blank and indent >= item + 4:
                yield number
            if found := _ITEM.match(line):
                item = found.end()
            elif indent == 0:
                item = 0
        blank = not line.strip()


def commands(page: Path) -> Iterator[tuple[str, list[str], bool]]:
    """Every `starter.py …` that the page names: as it stands there, its arguments, whether it is to be typed."""
    text = page.read_text()
    for found in _LINE.finditer(text):
        yield found[0].strip(), arguments(found[1]), True
    for block in blocks(page):
        if "starter.py" in block.said.get("output of", ""):
            yield block.said["output of"], arguments(block.said["output of"]), True
    for found in _INLINE.finditer(text):
        words = re.sub(r"[\[\]]", "", found[1]).replace("|", " ")
        yield found[0], shlex.split(words), False


def arguments(line: str) -> list[str]:
    """What a line of a shell gives to `starter.py`."""
    words = shlex.split(line.replace("\\\n", " "), comments=True)
    words = words[words.index("starter.py") + 1 :]
    ends = (at for at, word in enumerate(words) if word in ("|", ">", "&&", "&"))
    return words[: next(ends, len(words))]
