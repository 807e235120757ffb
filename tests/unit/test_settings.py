"""Only the documented variables count."""

from pathlib import Path

import pytest

from holdfast.settings import ModelTarget, Settings, unfit


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


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("HOLDFAST_SLOTS", "0", "greater than 0"),
        ("HOLDFAST_SLOTS", "-3", "greater than 0"),
        ("HOLDFAST_DRAIN_S", "-5", "greater than or equal to 0"),
        ("HOLDFAST_DRAIN_S", "nan", "finite"),
        ("HOLDFAST_PARK_S", "0", "greater than 0"),
        ("HOLDFAST_MODEL_FIRST_TOKEN_S", "-1", "greater than 0"),
        ("HOLDFAST_SERVICES", "rooms=http://there", "expected JSON"),
        ("HOLDFAST_SERVICES", '{"rooms": "localhost:9000"}', "begins with http:// or https://"),
        ("HOLDFAST_SERVICES", '{"rooms": "http://rooms:90000"}', "rooms: Value error, the address cannot be read"),
        ("HOLDFAST_SERVICES", '{"rooms": "http://the rooms"}', "without spaces"),
        ("HOLDFAST_HOSPITAL_URL", "http://[::1", "cannot be read"),
        ("HOLDFAST_HOSPITAL_URL", "http://there:port", "cannot be read"),
        ("HOLDFAST_HOSPITAL_URL", "//there", "begins with http:// or https://"),
        ("OPENAI_BASE_URL", "localhost:11434", "begins with http:// or https://"),
        ("HOLDFAST_BUILD_ID", 'a"b', "no spaces, quotes or backslashes"),
        ("HOLDFAST_DEPLOYMENT", "a.b", "no dots or colons"),
    ],
)
def test_a_value_that_does_not_fit_is_one_line_with_its_variable_and_what_fits(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError) as caught:
        Settings()
    line = unfit(caught.value) or ""
    assert line.startswith(f"an environment variable does not fit: {variable}")
    assert says in line and "\n" not in line
