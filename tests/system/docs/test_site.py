"""The documentation site: it builds strictly, nothing in it leads nowhere, and it needs no other host."""

import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from holdfast.dev.stack import ROOT
from holdfast.testing.patience import PATIENCE_S

BASE = "http://site.test/"


@dataclass
class Html(HTMLParser):
    """What a page leads to, what it loads, the places in it, and its text outside of code."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    nav: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    code: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
            if "md-nav__link" in found.get("class", "") or "md-tabs__link" in found.get("class", ""):
                self.nav.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(found["href"])
        elif "src" in found:
            self.loads.append(found["src"])
        self.code += tag in ("pre", "code", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self.code:
            self.text.append(data)


@dataclass
class Site:
    root: Path
    pages: dict[str, Html]
    """By their address below the root."""

    def lacks(self, page: str, link: str) -> bool:
        """Whether the link, as it stands on that page, leads nowhere within the site."""
        found = urlsplit(urljoin(BASE + page, link))
        path = unquote(found.path).lstrip("/")
        if path.endswith("/") or not path:
            path += "index.html"
        if not (self.root / path).is_file():
            return True
        return bool(found.fragment) and path in self.pages and unquote(found.fragment) not in self.pages[path].ids


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    pages: dict[str, Html] = {}
    for path in root.rglob("*.html"):
        pages[path.relative_to(root).as_posix()] = page = Html()
        page.feed(path.read_text())
    return Site(root, pages)


def elsewhere(address: str) -> bool:
    return bool(urlsplit(address).netloc) or address.startswith(("mailto:", "data:"))


def test_no_link_of_any_page_leads_nowhere(site: Site):
    dead: defaultdict[str, list[str]] = defaultdict(list)
    for name, page in site.pages.items():
        if name != "404.html":  # served under any address, so its links are from the root
            for link in page.links + page.loads:
                if not elsewhere(link) and site.lacks(name, link):
                    dead[name].append(link)
    assert not dead
    assert sum(len(page.links) for page in site.pages.values()) > 500


def test_nothing_is_loaded_from_elsewhere(site: Site):
    assert {each for page in site.pages.values() for each in page.loads if elsewhere(each)} == set()
    for sheet in site.root.rglob("*.css"):
        assert "url(http" not in sheet.read_text().replace('"', "").replace("'", ""), sheet.name


def test_every_page_of_docs_is_in_the_navigation(site: Site):
    home = {urlsplit(urljoin(BASE, link)).path.strip("/") for link in site.pages["index.html"].nav}
    for page in (ROOT / "docs").rglob("*.md"):
        path = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        path = "pages" if path == "README" else path
        assert path.removesuffix("/README") in home, f"{path} cannot be found"


def test_tables_and_lists_are_rendered_as_such(site: Site):
    for name, page in site.pages.items():
        lines = [line.strip() for text in page.text for line in text.splitlines()]
        assert not [line for line in lines if line.startswith(("| ", "- ", "```"))], name


def test_no_comment_shows(site: Site):
    for path in site.root.rglob("index.html"):
        if "source" not in path.relative_to(site.root).parts:
            assert "&lt;!--" not in path.read_text(), path


def test_a_test_that_a_guarantee_names_is_one_click_away_at_its_line(site: Site):
    links = [
        link for link in site.pages["reference/guarantees/recovery/index.html"].links if "/test_recovery.py/#" in link
    ]
    assert len(links) == 3
    assert 'class="nf">test_work_in_flight_runs_on_another_worker_within_seconds' in (
        next((site.root / "source/tests").rglob("test_recovery.py/index.html")).read_text()
    )
