"""What `up` writes for the other commands: what its workers use, and no secret."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path

import pytest
from pydantic import SecretStr

from holdfast.dev.published_settings import without_credentials, without_password
from holdfast.dev.stack import Stack
from holdfast.settings import Settings, settings

HIDDEN = "hunter2"
KEY = b64encode(b"hunter2" * 4 + b"1234").decode()
ELSEWHERE = {
    "DATABASE_URL": f"postgresql://app:{HIDDEN}@db.internal:5433/holdfast?sslmode=require&sslpassword={HIDDEN}",
    "OPENAI_BASE_URL": f"https://me:{HIDDEN}@models.internal/v1",
    "OPENAI_API_KEY": HIDDEN,
    "HOLDFAST_MODEL": "house-1",
    "HOLDFAST_MODEL_WINDOW": "32000",
    "HOLDFAST_MODEL_TEMPERATURE": "0.2",
    "HOLDFAST_MODEL_EXTRA": f'{{"token": "{HIDDEN}"}}',
    "HOLDFAST_MODEL_FALLBACKS": f"""[{{"model": "house-2", "base_url": "https://{HIDDEN}@two.internal/v1",
        "key_env": "TWO_KEY", "extra": {{"token": "{HIDDEN}"}}}}]""",
    "TWO_KEY": HIDDEN,
    "HOLDFAST_SERVICES": f'{{"rooms": "http://rooms:9000/api", "mail": "http://me:{HIDDEN}@mail?key={HIDDEN}"}}',
    "HOLDFAST_TASK_QUEUE": "ours",
    "HOLDFAST_PAYLOAD_LIMIT": "9000",
    "HOLDFAST_PAYLOAD_STORE": "s3://bucket/prefix",
    "HOLDFAST_ENCRYPTION_KEYS": f"k1:{KEY}",
    "HOLDFAST_CODEC_TOKEN": HIDDEN,
    "HOLDFAST_WEBHOOK_URL": f"https://hooks.example.com/{HIDDEN}",
    "HOLDFAST_WEBHOOK_SECRET": f"whsec_{KEY}",
    "HOLDFAST_MCP_TOKEN": HIDDEN,
}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """A stack that has published what its workers use, all of it set; this process has none of it."""
    for name in ELSEWHERE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    stack = Stack(tmp_path, ELSEWHERE, scripted_model=False)
    stack.publish()
    return stack


def test_no_secret_is_written_and_only_the_owner_may_read(elsewhere: Stack) -> None:
    secret = {str(each.alias) for each in Settings.model_fields.values() if each.annotation is SecretStr}
    assert secret <= {*ELSEWHERE}, "a new secret: give it a value here"
    file = elsewhere.home / "stack.json"
    assert HIDDEN not in file.read_text() and KEY not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


def test_another_terminal_has_what_the_workers_have(elsewhere: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Settings()
    assert found.stack_temporal_address == elsewhere.temporal_address
    assert found.hospital_url == elsewhere.hospital_url
    assert found.store_url == "postgresql://app@db.internal:5433/holdfast?sslmode=require"
    assert (found.openai_base_url, found.model, found.model_window) == ("https://models.internal/v1", "house-1", 32000)
    assert found.model_temperature == 0.2
    (second,) = found.model_fallbacks
    assert (second.model, second.base_url, second.key_env) == ("house-2", "https://two.internal/v1", "TWO_KEY")
    assert found.services == {"rooms": "http://rooms:9000/api", "mail": "http://mail"}
    assert (found.task_queue, found.payload_limit, found.payload_store) == ("ours", 9000, "s3://bucket/prefix")
    for variable in ("DATABASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "HOLDFAST_ENCRYPTION_KEYS"):
        assert f"set {variable} here" in found.kept_by_the_stack(variable)
    assert not found.kept_by_the_stack("HOLDFAST_MODEL")

    # What the terminal says itself comes first, and it talks to another cluster without anything of the stack.
    monkeypatch.setenv("DATABASE_URL", "postgresql://mine/mine")
    assert Settings().store_url == "postgresql://mine/mine"
    assert not Settings().kept_by_the_stack("DATABASE_URL")
    monkeypatch.delenv("DATABASE_URL")
    monkeypatch.setenv("TEMPORAL_ADDRESS", "temporal.internal:7233")
    apart = Settings()
    assert apart.store_url == f"sqlite:///{elsewhere.home / 'holdfast.db'}"
    assert (apart.model, apart.services, apart.stack_secrets) == ("gpt-5-mini", {}, ())


def test_a_stack_with_nothing_set_keeps_nothing_back(tmp_path: Path) -> None:
    settings.cache_clear()
    stack = Stack(tmp_path, {})
    told = json.loads(json.dumps(stack.published))
    assert told["stack_secrets"] == []
    assert told["DATABASE_URL"] == f"sqlite:///{tmp_path / 'holdfast.db'}"
    assert told["HOLDFAST_MODEL"] == "scripted-1"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("postgresql://u:p@h/d", "postgresql://u@h/d"),
        ("postgres://u:p%40x@h1:1,h2:2/d?a=b", "postgres://u@h1:1,h2:2/d?a=b"),
        ("postgresql://u:p?q#r@h/d", "postgresql://u@h/d"),
        ("postgresql://u:p:q@h", "postgresql://u@h"),
        ("postgresql://:p@h/d", "postgresql://@h/d"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgresql://h/d@e", "postgresql://h/d@e"),
        ("postgresql:///d?host=/run&password=p", "postgresql:///d?host=/run"),
        ("postgresql://h/d?password=p", "postgresql://h/d"),
        ("postgresql://h/d?a=b&pass%77ord=p&c=d", "postgresql://h/d?a=b&c=d"),
        ("postgresql://u:@[::1]:5432/d", "postgresql://u@[::1]:5432/d"),
        ("sqlite:////var/lib/holdfast.db", "sqlite:////var/lib/holdfast.db"),
    ],
)
def test_a_store_is_told_without_its_password(address: str, told: str) -> None:
    assert without_password(address) == told


def test_a_file_is_told_for_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_password("sqlite:///here.db") == f"sqlite:///{tmp_path / 'here.db'}"


def test_an_address_is_told_without_credentials() -> None:
    assert without_credentials("https://u:p@h:8443/v1?key=k#f") == "https://h:8443/v1"
    assert without_credentials("http://[::1]:80/v1") == "http://[::1]:80/v1"
