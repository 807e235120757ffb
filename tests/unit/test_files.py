"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast.files import write_whole


def test_a_file_takes_the_place_of_another_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for raw in (b"one", b"two"):
        write_whole(tmp_path / "a" / "b", raw)
        assert (tmp_path / "a" / "b").read_bytes() == raw
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "a" / "b", b"one")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_content_and_name_are_on_the_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def noted(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    write_whole(tmp_path / "a", b"one")
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]
