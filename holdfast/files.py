"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, raw: bytes) -> None:
    """Writes a file, and its folder; readers see all of it or what was there before. Durable at its return.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this attempt alone: one that was thought dead, maybe on another machine, may be writing the same file.
    draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        with suppress(OSError):  # what is left of it is hidden, and written over by nobody
            draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # The name is in the folder, which a power cut would leave as it was.
        with suppress(OSError):  # some shares have no such thing
            os.fsync(folder)
    finally:
        os.close(folder)
