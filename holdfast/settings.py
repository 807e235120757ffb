"""Reads the environment; the only module that does.

Precedence: environment variables, then the settings of the embedded stack (`.holdfast/stack.json`, written by
`starter.py up`), then defaults. When `TEMPORAL_*` or the Temporal profile names a server, the stack's settings are
ignored: a client of another cluster must not use the embedded stack's store. `holdfast.engine.client` reads the
Temporal connection.
"""

from __future__ import annotations

import os
import re
from base64 import b64decode
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    JsonConfigSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from holdfast.setting_formats import OURS, addresses, folders, parse_keys

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from temporalio.envconfig import ClientConfigProfile


def _address(value: str) -> str:
    try:
        where = urlsplit(value)
        _ = where.port  # parses the port, which can raise
    except ValueError as error:
        raise ValueError(f"the address cannot be read: {error}") from None
    if re.search(r"[\s\0]", value):
        raise ValueError("expected an address without spaces")
    if value and (where.scheme not in ("http", "https") or not where.hostname):
        raise ValueError("expected an address that begins with http:// or https://")
    return value


def _build(value: str) -> str:
    # Searches on the server put the build in quotes.
    if re.search(r"[\s\"'`\\]", value):
        raise ValueError("expected no spaces, quotes or backslashes")
    return value


def _deployment(value: str) -> str:
    if "." in value or ":" in value:
        raise ValueError("expected no dots or colons")
    return _build(value)


Address = Annotated[str, AfterValidator(_address)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


LimitName = Literal["max_tokens", "max_completion_tokens"]


def _extra(value: dict[str, Any]) -> dict[str, Any]:
    if clash := OURS & {*value}:
        raise ValueError(f"Holdfast sets {', '.join(sorted(clash))} itself")
    return value


Extra = Annotated[dict[str, Any], AfterValidator(_extra)]


class ModelTarget(BaseModel):
    """A model at an endpoint."""

    model_config = ConfigDict(extra="forbid")

    model: str
    base_url: Address = ""
    """Empty: the first model's endpoint and key."""
    key_env: str = ""
    """The environment variable that holds the key of another endpoint."""
    window: int | None = Field(default=None, gt=0)
    """Context window in tokens; None: unknown."""
    requests_per_minute: int | None = Field(default=None, gt=0)
    tokens_per_minute: int | None = Field(default=None, gt=0)
    max_in_flight: int | None = Field(default=None, gt=0)
    """Requests in flight of all workers together; None: no limit."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Tokens of an answer; None: the agent's limit, else 8192."""
    limit_name: LimitName | None = None
    """The endpoint's name for that limit; None: detected."""
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    extra: Extra = {}
    """Additional parameters of each request."""


class BadStackFile(Exception):
    """`stack.json` cannot be read. The message is one line that says what to do."""


class _Stack(JsonConfigSettingsSource):
    def _read_file(self, file_path: Path | Traversable) -> dict[str, Any]:
        try:
            found = super()._read_file(file_path)
            if isinstance(found, dict):
                return found
            error = f"it holds a {type(found).__name__}"
        except (OSError, ValueError, RecursionError) as raised:
            error = str(raised)
        raise BadStackFile(
            f"{file_path}, the settings that `starter.py up` writes, cannot be read ({error}):"
            " remove it, and start `up` again"
        )


class Settings(BaseSettings):
    """Everything that may differ between two machines. Field names are the environment variables."""

    # Applies to the fields' Python names: without the prefix, `HOME` would set `home`.
    model_config = SettingsConfigDict(
        extra="ignore",
        populate_by_name=True,
        env_prefix="HOLDFAST_FIELD_",
        env_ignore_empty=True,
        # Errors are printed, and an invalid value may be a key.
        hide_input_in_errors=True,
    )

    home: Annotated[Path, Field(alias="HOLDFAST_HOME")] = Path(".holdfast")
    """Directory with the state of the embedded stack."""
    agents: Annotated[str, Field(alias="HOLDFAST_AGENTS")] = ""
    """Folders of agents beside the shipped ones, with `:` between them."""
    temporal_cli: Annotated[str, Field(alias="HOLDFAST_TEMPORAL_CLI")] = ""
    """The `temporal` binary of the embedded stack and of the tests; empty: the one installed beside Python."""
    database_url: Annotated[str, Field(alias="DATABASE_URL")] = ""
    """`postgresql://…`; empty means SQLite under `home`."""
    store_timeout_s: Annotated[Seconds, Field(alias="HOLDFAST_STORE_TIMEOUT_S", ge=1)] = 10.0
    """How long a statement may take, and how long a call waits for a connection or a lock before that."""
    task_queue: Annotated[str, Field(alias="HOLDFAST_TASK_QUEUE")] = "holdfast"

    build_id: Annotated[str, Field(alias="HOLDFAST_BUILD_ID"), AfterValidator(_build)] = "dev"
    """Identifies this build in every task of its workers; a deployment sets its version or commit."""
    deployment: Annotated[str, Field(alias="HOLDFAST_DEPLOYMENT", max_length=100), AfterValidator(_deployment)] = ""
    """The Temporal Worker Deployment that the workers belong to; empty: they are not versioned."""

    openai_base_url: Annotated[Address, Field(alias="OPENAI_BASE_URL")] = "https://api.openai.com/v1"
    openai_api_key: Annotated[SecretStr, Field(alias="OPENAI_API_KEY")] = SecretStr("")
    model: Annotated[str, Field(alias="HOLDFAST_MODEL")] = "gpt-5-mini"
    model_window: Annotated[int | None, Field(alias="HOLDFAST_MODEL_WINDOW", gt=0)] = None
    """Context window of the model in tokens; a conversation that does not fit is not sent to it."""
    model_rpm: Annotated[int | None, Field(alias="HOLDFAST_MODEL_RPM", gt=0)] = None
    model_tpm: Annotated[int | None, Field(alias="HOLDFAST_MODEL_TPM", gt=0)] = None
    """Tokens per minute of all workers together; `model_rpm`: requests. None: no limit."""
    model_concurrency: Annotated[int | None, Field(alias="HOLDFAST_MODEL_CONCURRENCY", gt=0)] = None
    """Requests in flight of all workers together; None: no limit."""
    model_max_tokens: Annotated[int | None, Field(alias="HOLDFAST_MODEL_MAX_TOKENS", gt=0)] = None
    """Tokens of an answer; None: the agent's limit, else 8192."""
    model_limit_name: Annotated[LimitName | None, Field(alias="HOLDFAST_MODEL_LIMIT_NAME")] = None
    """The endpoint's name for that limit; None: `max_completion_tokens` at OpenAI, `max_tokens` elsewhere, and the
    other name where the endpoint refuses it."""
    model_temperature: Annotated[float | None, Field(alias="HOLDFAST_MODEL_TEMPERATURE", ge=0, allow_inf_nan=False)] = (
        None
    )
    model_extra_parameters: Annotated[Extra, Field(alias="HOLDFAST_MODEL_EXTRA")] = {}
    """Additional parameters of each request, a JSON object, e.g. `{"reasoning_effort": "low"}`."""
    model_fallbacks: Annotated[tuple[ModelTarget, ...], Field(alias="HOLDFAST_MODEL_FALLBACKS")] = ()
    """Fallback models, in this order: a JSON list, e.g. `[{"model": "gpt-5-nano", "window": 400000}]`."""

    encryption_keys: Annotated[SecretStr, Field(alias="HOLDFAST_ENCRYPTION_KEYS")] = SecretStr("")
    """`id:base64,id:base64`, 32 bytes each: the first key encrypts payloads in Temporal, all keys decrypt."""
    payload_limit: Annotated[int, Field(alias="HOLDFAST_PAYLOAD_LIMIT", ge=1000, le=1_000_000)] = 65_536
    """Bytes; payload storage takes larger payloads. Temporal accepts 2 MB at most."""
    payload_store: Annotated[str, Field(alias="HOLDFAST_PAYLOAD_STORE")] = "store"
    """`store`, `file:///directory` or `s3://bucket/prefix`. Of several, the first is written to and all are read."""
    codec_token: Annotated[SecretStr, Field(alias="HOLDFAST_CODEC_TOKEN")] = SecretStr("")
    """Lets its holder read encrypted payloads through `starter.py codec-server`."""
    webhook_url: Annotated[str, Field(alias="HOLDFAST_WEBHOOK_URL")] = ""
    """Address for the events of runs that name no webhook of their own at their start."""
    webhook_secret: Annotated[SecretStr, Field(alias="HOLDFAST_WEBHOOK_SECRET")] = SecretStr("")
    """`whsec_…`; several, separated by spaces, during a rotation: each of them signs."""
    webhook_hosts: Annotated[str, Field(alias="HOLDFAST_WEBHOOK_HOSTS")] = ""
    """Hosts that webhooks may be sent to, e.g. `hooks.example.com *.internal`; empty: any."""

    hospital_url: Annotated[Address, Field(alias="HOLDFAST_HOSPITAL_URL")] = "http://127.0.0.1:8090"
    services: Annotated[dict[str, Address], Field(alias="HOLDFAST_SERVICES")] = {}
    """Base addresses of services, which tools get from `ctx.service_url(name)`: a JSON object."""
    otlp_endpoint: Annotated[str, Field(alias="OTEL_EXPORTER_OTLP_ENDPOINT")] = ""

    mcp_token: Annotated[SecretStr, Field(alias="HOLDFAST_MCP_TOKEN")] = SecretStr("")
    """The bearer token that clients of `starter.py mcp --http` must send."""

    model_first_token_s: Annotated[Seconds, Field(alias="HOLDFAST_MODEL_FIRST_TOKEN_S")] = 20.0
    model_between_tokens_s: Annotated[Seconds, Field(alias="HOLDFAST_MODEL_BETWEEN_TOKENS_S")] = 20.0
    model_total_s: Annotated[float, Field(alias="HOLDFAST_MODEL_TOTAL_S", gt=0, le=130)] = 120.0
    """At most 130: a turn may make three requests within its activity's timeout."""
    park_s: Annotated[Seconds, Field(alias="HOLDFAST_PARK_S")] = 30.0
    """How long a run is parked before it tries an unavailable model again."""
    slots: Annotated[Annotated[int, Field(gt=0)] | Literal["resource"], Field(alias="HOLDFAST_SLOTS")] = 200
    """Activities at a time in a worker; `resource`: as many as CPU and memory allow."""
    slots_cpu: Annotated[float, Field(alias="HOLDFAST_SLOTS_CPU", gt=0, le=1)] = 0.8
    slots_memory: Annotated[float, Field(alias="HOLDFAST_SLOTS_MEMORY", gt=0, le=1)] = 0.8
    """Shares of the CPU and memory of the machine or container up to which `resource` takes more work."""
    drain_s: Annotated[float, Field(alias="HOLDFAST_DRAIN_S", ge=0, allow_inf_nan=False)] = 20.0
    """How long a stopping worker waits for work in flight."""

    stack_temporal_address: str = ""
    """Address of the embedded stack's server; set only by `stack.json`."""
    stack_secrets: tuple[str, ...] = ()
    """Variables whose secrets only the embedded stack's workers have; set only by `stack.json`."""
    ui_url: Annotated[Address, Field(alias="HOLDFAST_UI_URL")] = "http://localhost:8233"
    """Base address of the Temporal Web UI, for links."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        stack = stack_file()
        if not stack.exists() or _names_a_server():
            return (init_settings, env_settings)
        return (init_settings, env_settings, _Stack(settings_cls, json_file=stack))

    @field_validator("encryption_keys")
    @classmethod
    def _keys_fit(cls, value: SecretStr) -> SecretStr:
        parse_keys(value.get_secret_value())
        return value

    @field_validator("payload_store")
    @classmethod
    def _addresses_fit(cls, value: str) -> str:
        addresses(value)
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _is_a_secret(cls, value: SecretStr) -> SecretStr:
        for each in value.get_secret_value().split():
            try:
                key = b64decode(each.removeprefix("whsec_"), validate=True)
            except ValueError:
                key = b""
            if not each.startswith("whsec_") or len(key) < 16:
                raise ValueError(
                    "expected `whsec_` and at least 16 random bytes in base64, e.g. of `openssl rand -base64 32`"
                )
        return value

    @property
    def webhook_secrets(self) -> list[str]:
        return self.webhook_secret.get_secret_value().split()

    @property
    def models(self) -> tuple[ModelTarget, ...]:
        """The models, in the order in which they are tried."""
        first = ModelTarget(
            model=self.model,
            window=self.model_window,
            requests_per_minute=self.model_rpm,
            tokens_per_minute=self.model_tpm,
            max_in_flight=self.model_concurrency,
            max_tokens=self.model_max_tokens,
            limit_name=self.model_limit_name,
            temperature=self.model_temperature,
            extra=self.model_extra_parameters,
        )
        return (first, *self.model_fallbacks)

    def kept_by_the_stack(self, variable: str) -> str:
        """What to do about a missing secret that the embedded stack does not publish; empty when it has none."""
        if variable not in self.stack_secrets or os.environ.get(variable):
            return ""
        return f"`up` has a secret in its {variable}, which it does not publish: set {variable} here to the same value"

    @property
    def agent_folders(self) -> list[Path]:
        return folders(self.agents)

    @property
    def store_url(self) -> str:
        """The store's address: `DATABASE_URL`, or the SQLite file under `home`."""
        return self.database_url or f"sqlite:///{(self.home / 'holdfast.db').resolve()}"


def stack_file() -> Path:
    """The file to which `starter.py up` writes its settings: a JSON object by environment variable."""
    return Path(os.environ.get("HOLDFAST_HOME", ".holdfast")) / "stack.json"


def _names_a_server() -> bool:
    if os.environ.get("TEMPORAL_ADDRESS"):
        return True
    return bool(temporal_profile().address)


class BadProfile(Exception):
    """The profile of the Temporal CLI cannot be read. The message is one line that says what to do."""


def temporal_profile() -> ClientConfigProfile:
    """The standard profile, with `TEMPORAL_*` over it. Raises BadProfile."""
    from temporalio.envconfig import ClientConfigProfile

    try:
        return ClientConfigProfile.load()
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        told = {name: os.environ.get(name) for name in ("TEMPORAL_PROFILE", "TEMPORAL_CONFIG_FILE")}
        names = ", ".join(f"{name}={value}" for name, value in told.items() if value) or "its file"
        words = " ".join(str(error).split())
        raise BadProfile(f"the profile of the Temporal CLI cannot be read ({words}): correct {names}") from None


@cache
def settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()


def unfit(error: Exception) -> str | None:
    """One line on the invalid variables, for an error that `Settings()` raises; None for any other error."""
    if isinstance(error, SettingsError):
        # It names the field; its cause is the JSON parser's error.
        field = re.search(r'field "(\w+)"', str(error))
        known = Settings.model_fields.get(field[1]) if field else None
        what = f"{known.alias}: expected JSON ({error.__cause__})" if known else str(error)
    elif isinstance(error, ValidationError) and error.title == "Settings":
        what = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    else:
        return None
    return f"an environment variable does not fit: {what}"
