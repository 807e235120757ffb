"""Where Holdfast's own files are; atomic, durable file writes."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent
INSIDE = LIBRARY / "_application"
"""Where the installed package has what stands beside `holdfast/` in a clone (`force-include` in pyproject.toml)."""
ROOT = INSIDE if INSIDE.is_dir() else LIBRARY.parent
"""The folder with `worker.py`, `starter.py`, `workflows/`, `activities/` and `agents/`; in a clone its root."""


def write_whole(path: Path, raw: bytes) -> None:
    """Writes a file atomically, and creates its folder: readers see the new content or the old one. Durable on return.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name for this attempt only: an earlier attempt, maybe on another machine, may still be writing the same file.
    draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        with suppress(OSError):  # a leftover draft is hidden and does no harm
            draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # Without this, a power cut could lose the new name in the folder.
        with suppress(OSError):  # some network shares do not support it
            os.fsync(folder)
    finally:
        os.close(folder)
