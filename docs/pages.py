"""Hooks of mkdocs: README.md and CHANGELOG.md as pages, the navigation, and links from docs/ to files outside of it.

Pages are written for a reader of the repository: a link names the file as it lies there, also if that is code. A test
is named by its file and itself, `test_life.py::test_turns_are_bounded`, wherever the file lies. The site has a copy of
each file that is linked or named so, and such a test's name leads to its line.
"""

import ast
import os
import re
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
HOME = "index.md"
OUTSIDE = {HOME: ROOT / "README.md", "changelog.md": ROOT / "CHANGELOG.md", "pages.md": DOCS / "README.md"}
"""Pages of the site that lie outside of docs/, and docs/README.md, which would take the place of the first page."""

LINK = re.compile(r"(!?\[([^\]]+)\])\(([^)\s#]+)(#[^)\s]*)?\)")
TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml", ".json": "json"}

SECTIONS: dict[str, list[str]] = {
    "Start": [HOME, "pages.md"],
    "Tutorial": ["tutorial/README.md", "tutorial/demo.md"],
    "How to": [
        "how-to/own-agents.md",
        "how-to/own-repository.md",
        "how-to/graphs.md",
        "how-to/polling.md",
        "how-to/mcp.md",
        "how-to/*.md",
    ],
    "Reference": ["reference/commands.md", "reference/settings.md", "reference/*.md", "changelog.md"],
    "Guarantees": ["reference/guarantees/*.md"],
    "Explanation": ["explanation/architecture.md", "explanation/*.md"],
}
"""Pages by section; a pattern takes those that no section names."""
SHORT = {"tutorial/README.md": "Tutorial", "how-to/patching.md": "Patching workflows"}
"""What the navigation calls a page whose heading is too long for it."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = navigation()
    return config


def navigation() -> list[dict[str, object]]:
    """Every page under its section. A new page of docs/ needs no entry: the section with the pattern takes it."""
    named = {path for paths in SECTIONS.values() for path in paths}
    nav: list[dict[str, object]] = []
    for section, paths in SECTIONS.items():
        found: list[str] = []
        for path in paths:
            if "*" in path:
                pages = sorted(each.relative_to(DOCS).as_posix() for each in DOCS.glob(path))
                found += [page for page in pages if page not in named]
            elif path in OUTSIDE or (DOCS / path).exists():
                found.append(path)
        if len(found) == 1:
            nav.append({section: found[0]})
        elif found:
            nav.append({section: [{SHORT[page]: page} if page in SHORT else page for page in found]})
    return nav


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    pages = [*OUTSIDE.values(), *(DOCS / file.src_uri for file in files.documentation_pages())]
    for uri, page in OUTSIDE.items():
        head = "---\nhide: [navigation]\n---\n\n" if uri == HOME else ""
        files.append(File.generated(config, uri, content=head + page.read_text()))
    linked = {target for page in pages for target in (*_targets(page), *_tests(page)) if _is_source(target)}
    for source in sorted(linked):
        name, language = source.relative_to(ROOT).as_posix(), LANGUAGES.get(source.suffix, "text")
        # A file may hold fences of its own, of three.
        text = f'---\ntitle: {name}\nsearch: {{exclude: true}}\n---\n\n# `{name}`\n\n``````{language} linenums="1"\n'
        files.append(File.generated(config, _copy(source), content=f"{text}{source.read_text()}``````\n"))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    original = OUTSIDE.get(uri, DOCS / uri)

    def rewritten(found: re.Match[str]) -> str:
        label, text, path, anchor = found.groups()
        if "://" in path:
            return found[0]
        target = (original.parent / path).resolve()
        if target in OUTSIDE.values():
            to = next(page for page, file in OUTSIDE.items() if file == target)
        elif target.is_relative_to(DOCS) and not _is_source(target):
            to = target.relative_to(DOCS).as_posix()
        elif _is_source(target):
            to, anchor = _copy(target), _line(target, text)
        else:
            return found[0]  # the strict build complains of it
        return f"{label}({os.path.relpath(to, Path(uri).parent)}{anchor or ''})"

    def linked(found: re.Match[str]) -> str:
        files = files_of_test(*found.groups())
        if len(files) != 1:
            return found[0]
        return f"[{found[2]}]({os.path.relpath(_copy(files[0]), Path(uri).parent)}{_line(files[0], found[2])})"

    return TEST.sub(linked, LINK.sub(rewritten, markdown))


def files_of_test(file: str, name: str) -> list[Path]:
    """The test files of that name, wherever they lie, that define the test: exactly one if the pages are right."""
    found = (path for folder in ("tests", "agents") for path in sorted((ROOT / folder).rglob(file)))
    return [path for path in found if name in _functions(path)]


@cache
def _functions(source: Path) -> frozenset[str]:
    nodes = ast.walk(ast.parse(source.read_text()))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _tests(page: Path) -> set[Path]:
    return {path for found in TEST.finditer(page.read_text()) for path in files_of_test(*found.groups())}


def _targets(page: Path) -> set[Path]:
    links = (found[3] for found in LINK.finditer(page.read_text()) if "://" not in found[3])
    return {(page.parent / path).resolve() for path in links}


def _is_source(target: Path) -> bool:
    return target.is_file() and target.is_relative_to(ROOT) and target.suffix not in (".md", ".png", ".svg", ".css")


def _copy(source: Path) -> str:
    return f"source/{source.relative_to(ROOT).as_posix()}.md"


def _line(source: Path, name: str) -> str:
    """The anchor of the line that defines what the link's text names; none when nothing does."""
    for number, line in enumerate(source.read_text().splitlines(), 1):
        if re.match(rf"\s*(async )?(def|class) {re.escape(name.strip('`'))}\b", line):
            return f"#__codelineno-0-{number}"
    return ""
