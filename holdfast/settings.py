"""The one place that reads the environment.

The Temporal connection is the exception: `holdfast.temporal` reads it through the standard profile and `TEMPORAL_*`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Everything that may differ between two machines. Field names are the environment variables."""

    model_config = SettingsConfigDict(extra="ignore", populate_by_name=True)

    home: Annotated[Path, Field(alias="HOLDFAST_HOME")] = Path(".holdfast")
    """State of the embedded stack."""
    database_url: Annotated[str, Field(alias="DATABASE_URL")] = ""
    """`postgresql://…`; empty means SQLite under `home`."""
    task_queue: Annotated[str, Field(alias="HOLDFAST_TASK_QUEUE")] = "holdfast"

    openai_base_url: Annotated[str, Field(alias="OPENAI_BASE_URL")] = "https://api.openai.com/v1"
    openai_api_key: Annotated[SecretStr, Field(alias="OPENAI_API_KEY")] = SecretStr("")
    model: Annotated[str, Field(alias="HOLDFAST_MODEL")] = "gpt-5-mini"

    hospital_url: Annotated[str, Field(alias="HOLDFAST_HOSPITAL_URL")] = "http://127.0.0.1:8090"
    otlp_endpoint: Annotated[str, Field(alias="OTEL_EXPORTER_OTLP_ENDPOINT")] = ""

    model_first_token_s: Annotated[float, Field(alias="HOLDFAST_MODEL_FIRST_TOKEN_S")] = 20.0
    model_between_tokens_s: Annotated[float, Field(alias="HOLDFAST_MODEL_BETWEEN_TOKENS_S")] = 20.0
    model_total_s: Annotated[float, Field(alias="HOLDFAST_MODEL_TOTAL_S")] = 120.0
    park_s: Annotated[float, Field(alias="HOLDFAST_PARK_S")] = 30.0
    """How long a run sleeps before it tries a model again that is gone."""
    drain_s: Annotated[float, Field(alias="HOLDFAST_DRAIN_S")] = 20.0
    """A worker that is told to stop finishes what is in flight, at most this long."""

    @property
    def store_url(self) -> str:
        """The store's address: `DATABASE_URL`, or the SQLite file under `home`."""
        return self.database_url or f"sqlite:///{(self.home / 'holdfast.db').resolve()}"


@cache
def settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
