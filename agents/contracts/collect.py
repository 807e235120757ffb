"""Collects the licence texts installed on this machine: `python -m agents.contracts.collect FOLDER [--limit N]`.

Sources: installed Python distributions (LICENSE*, COPYING*, NOTICE*), /usr/share/common-licenses and
/usr/share/doc/*/copyright. Copies each distinct content once, under a stable name; `.manifest.json` lists its sources.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

NAMES = re.compile(r"(licen[cs]e|copying|notice)", re.I)
COMMON = Path("/usr/share/common-licenses")
DOC = Path("/usr/share/doc")


def sources() -> Iterator[tuple[str, Path]]:
    """Yields a name and the file of each text."""
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if NAMES.match(path.name) and path.suffix not in (".py", ".pyc", ".pyi") and path.is_file():
                yield f"python-{distribution.name}-{path.name}", path
    for path in COMMON.glob("*") if COMMON.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            yield f"common-{path.name}", path
    for path in DOC.glob("*/copyright") if DOC.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            yield f"debian-{path.parent.name}-copyright", path


def collect(folder: Path, limit: int | None = None) -> int:
    """Copies the texts into the folder and returns their number."""
    contents: dict[str, bytes] = {}
    found: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, path in sources():
        raw = path.read_bytes()
        digest = sha256(raw).hexdigest()
        contents[digest] = raw
        found[digest].append((re.sub(r"[^A-Za-z0-9.]+", "-", name), str(path)))
    named = sorted((min(places)[0], digest) for digest, places in found.items())[:limit]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {}
    for name, digest in named:
        file = f"{name}-{digest[:8]}.txt"
        (folder / file).write_bytes(contents[digest])
        manifest[file] = sorted(place for _, place in found[digest])
    (folder / ".manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return len(named)


def main() -> int:
    parser = argparse.ArgumentParser(prog="agents.contracts.collect", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, help="at most this many texts, in the order of their names")
    options = parser.parse_args()
    print(f"{collect(options.folder, options.limit)} texts in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
