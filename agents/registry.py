"""Finds the agents: every `SPEC` in `agents/<name>/spec.py`. Adding a folder is all it takes."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path

from holdfast.agent import AgentSpec


class UnknownAgent(Exception):
    """No agent of that name."""


_added: dict[str, AgentSpec] = {}


@cache
def _found() -> dict[str, AgentSpec]:
    specs = (import_module(f"agents.{path.parent.name}.spec").SPEC for path in Path(__file__).parent.glob("*/spec.py"))
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}


def add(spec: AgentSpec) -> AgentSpec:
    """Registers an agent that does not live under `agents/` (tests, benchmarks)."""
    _added[spec.name] = spec
    return spec


def agents() -> dict[str, AgentSpec]:
    """All agents by name."""
    return {**_found(), **_added}


def agent(name: str) -> AgentSpec:
    """The agent of that name. Raises UnknownAgent, naming those there are."""
    try:
        return agents()[name]
    except KeyError:
        raise UnknownAgent(f"no agent named {name!r}; there are: {', '.join(agents())}") from None
