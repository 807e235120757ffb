"""Only the documented variables count."""

from pathlib import Path

import pytest

from holdfast.settings import ModelTarget, Settings


def test_variables_of_other_programs_are_not_taken_for_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "MODEL", "BUILD_ID", "TASK_QUEUE", "UI_URL"):
        monkeypatch.setenv(name, "/somewhere/else")
    for name in ("HOLDFAST_HOME", "HOLDFAST_MODEL", "HOLDFAST_BUILD_ID", "HOLDFAST_TASK_QUEUE"):
        monkeypatch.delenv(name, raising=False)
    found = Settings()
    assert (found.home, found.model, found.build_id, found.task_queue) == (
        Path(".holdfast"),
        "gpt-5-mini",
        "dev",
        "holdfast",
    )


def test_the_chain_of_models_begins_with_the_first_and_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_MODEL", "large")
    monkeypatch.setenv("HOLDFAST_MODEL_RPM", "500")
    monkeypatch.setenv("HOLDFAST_MODEL_FALLBACKS", '[{"model": "small", "window": 8000}, {"model": "tiny"}]')
    assert Settings().models == (
        ModelTarget(model="large", requests_per_minute=500),
        ModelTarget(model="small", window=8000),
        ModelTarget(model="tiny"),
    )
