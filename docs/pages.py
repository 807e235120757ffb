"""Hooks of mkdocs: README.md and CHANGELOG.md as pages, the navigation, and links from docs/ to files outside of it.

Pages are written for a reader of the repository: a link names the file as it lies there, also a test or code. The site
has a copy of each linked file, and a link whose text is a test's name leads to that test's line.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
HOME = "index.md"
OUTSIDE = {HOME: ROOT / "README.md", "changelog.md": ROOT / "CHANGELOG.md"}
"""Pages of the site that lie outside of docs/."""

LINK = re.compile(r"(!?\[([^\]]+)\])\(([^)\s#]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml", ".json": "json"}

SECTIONS: dict[str, list[str]] = {
    "Start": [HOME, "demo.md", "tutorial.md"],
    "Guides": ["own-agents.md", "*.md"],
    "Reference": ["commands.md", "settings.md", "glossary.md", "changelog.md"],
    "Guarantees": ["guarantees/README.md", "promises.md", "guarantees/*.md"],
    "Production": ["operations.md", "deployment.md", "patching.md"],
    "Architecture": ["architecture.md"],
    "Measured": ["kill-sweep.md", "chaos.md", "benchmark.md", "comparison.md", "trial.md"],
}
"""Pages by section; a pattern takes those that no section names."""
SHORT = {"patching.md": "Patching workflows", "guarantees/README.md": "Overview", "kill-sweep.md": "Kill sweep"}
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
    linked = {target for page in pages for target in _targets(page) if _is_source(target)}
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

    return LINK.sub(rewritten, markdown)


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
