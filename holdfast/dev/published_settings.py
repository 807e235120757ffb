"""The settings of the embedded stack's workers that it publishes to other commands: all but the secrets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from holdfast.setting_formats import folders

PLAIN = (
    "HOLDFAST_TASK_QUEUE",
    "HOLDFAST_DEPLOYMENT",
    "HOLDFAST_MODEL",
    "HOLDFAST_MODEL_WINDOW",
    "HOLDFAST_MODEL_MAX_TOKENS",
    "HOLDFAST_MODEL_LIMIT_NAME",
    "HOLDFAST_MODEL_TEMPERATURE",
    "HOLDFAST_PAYLOAD_LIMIT",
    "HOLDFAST_PAYLOAD_STORE",
)
"""Settings that hold no secret, published unchanged."""
SECRET = ("OPENAI_API_KEY", "HOLDFAST_ENCRYPTION_KEYS")
"""Settings published by name only, so that a command can say what it lacks."""
STORE_SECRETS = ("password", "sslpassword")
"""Postgres connection parameters that hold a secret."""
FALLBACK = ("model", "base_url", "key_env", "window", "max_tokens", "limit_name", "temperature")
"""Published fields of a fallback model: not `extra`, which may hold a secret."""


def published(environment: Mapping[str, str]) -> dict[str, Any]:
    """The workers' environment as `stack.json` holds it, by the names of `Settings`."""
    told: dict[str, Any] = {name: value for name in PLAIN if (value := environment.get(name))}
    kept = [name for name in SECRET if environment.get(name)]

    def tell(variable: str, value: Any, whole: bool) -> None:
        told[variable] = value
        if not whole:
            kept.append(variable)

    if store := environment.get("DATABASE_URL"):
        address = without_password(store)
        tell("DATABASE_URL", address, address == store or store.startswith("sqlite"))
    if model := environment.get("OPENAI_BASE_URL"):
        address = without_credentials(model)
        tell("OPENAI_BASE_URL", address, address == model)
    if services := json.loads(environment.get("HOLDFAST_SERVICES") or "{}"):
        addresses = {name: without_credentials(value) for name, value in services.items()}
        tell("HOLDFAST_SERVICES", addresses, addresses == services)
    if agents := environment.get("HOLDFAST_AGENTS"):
        told["HOLDFAST_AGENTS"] = os.pathsep.join(map(str, folders(agents)))
    if models := json.loads(environment.get("HOLDFAST_MODEL_FALLBACKS") or "[]"):
        told["HOLDFAST_MODEL_FALLBACKS"] = [_fallback(each) for each in models]
    return {**told, "stack_secrets": kept}


def _fallback(model: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: model[name] for name in FALLBACK if name in model}
    if address := told.get("base_url"):
        told["base_url"] = without_credentials(address)
    return told


def without_password(store: str) -> str:
    """The store's address, valid in any directory, with the user but without a password.

    Parses like libpq, which finds passwords that a general URL parser misses.
    """
    scheme, separator, rest = store.partition("://")
    if scheme == "sqlite":
        return f"sqlite:///{Path(rest.removeprefix('/')).resolve()}"
    end = next((n for n, each in enumerate(rest) if each in "@/"), len(rest))
    if rest[end : end + 1] == "@":
        rest = rest[:end].partition(":")[0] + rest[end:]
    where, question, parameters = rest.partition("?")
    kept = [each for each in parameters.split("&") if unquote(each.partition("=")[0]) not in STORE_SECRETS]
    return f"{scheme}{separator}{where}{question if any(kept) else ''}{'&'.join(kept)}"


def without_credentials(address: str) -> str:
    """An http address without a user, a password and parameters."""
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
