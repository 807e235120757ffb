"""The folder of a batch: results for people, and the data that the stages pass on, stored by digest.

Files are written atomically, and the same content always under the same name, so a stage that is repeated after a crash
changes nothing. Workers on several machines need the folder on a shared disk.
"""

from __future__ import annotations

import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from holdfast import ToolFailed, ToolRefused
from holdfast.contracts.failures import ErrorType, Failure
from holdfast.files import write_whole


class DiskTrouble(Exception):
    """The workspace cannot be read or written for now: the disk is full, or the share is unavailable."""

    def __init__(self, error: OSError) -> None:
        words = f"workspace: {error.strerror or error}"
        super().__init__(words)
        self.failure = Failure(ErrorType.UNAVAILABLE, words, retry=True)


class Workspace:
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def belongs_to(self, folder: Path) -> None:
        """Claims the workspace for this folder's documents. Raises ToolRefused when it belongs to another, DiskTrouble.

        Results are named after their documents, so the results of two folders would overwrite each other.
        """
        mark, name = self.folder / ".documents", os.fsencode(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError), mark.open("xb") as file:
                file.write(name)
            if not (owner := mark.read_bytes()):  # left by a worker that died here
                write_whole(mark, owner := name)
        except OSError as error:
            raise DiskTrouble(error) from None
        if owner != name:
            other = owner.decode(errors="replace")
            raise ToolRefused(f"the workspace {self.folder} holds the results of {other}: name another one")

    def keep(self, text: str) -> str:
        """Stores a text for the following stages and returns its digest, which `kept` takes. Raises DiskTrouble."""
        raw = text.encode(errors="replace")  # a model's answer may hold a lone surrogate
        digest = sha256(raw).hexdigest()[:32]
        path = self._part(digest)
        if not path.exists():
            self._write(path, raw)
        return digest

    def kept(self, digest: str) -> str:
        """Returns a stored text. Raises ToolFailed when it is missing or damaged, DiskTrouble."""
        try:
            raw = self._part(digest).read_bytes()
        except FileNotFoundError:
            raise ToolFailed(f"{digest} is gone from {self.folder}") from None
        except OSError as error:
            raise DiskTrouble(error) from None
        if sha256(raw).hexdigest()[:32] != digest:
            raise ToolFailed(f"{digest} was changed in {self.folder}")
        return raw.decode()

    def write(self, name: str, text: str) -> Path:
        """Writes a result. Raises DiskTrouble."""
        path = self.folder / name
        self._write(path, text.encode())
        return path

    def delete(self, name: str) -> bool:
        """Deletes a result and returns whether it existed. Raises DiskTrouble."""
        try:
            (self.folder / name).unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise DiskTrouble(error) from None
        return True

    def _part(self, digest: str) -> Path:
        return self.folder / ".parts" / digest[:2] / digest

    def _write(self, path: Path, raw: bytes) -> None:
        try:
            write_whole(path, raw)
        except OSError as error:
            raise DiskTrouble(error) from None
