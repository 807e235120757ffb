"""Finds the agents: every `SPEC` in `agents/<name>/spec.py`. Adding a folder is all it takes."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path

from holdfast.agent import AgentSpec
from holdfast.services import Service


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
    _services.cache_clear()
    return spec


def service(name: str) -> Service:
    """What is declared of a service; the defaults when no agent says anything."""
    return _services().get(name) or Service(name)


@cache
def _services() -> dict[str, Service]:
    """Raises TypeError when two agents disagree: a service has one breaker and one limit for all."""
    found: dict[str, Service] = {}
    for spec in agents().values():
        for each in spec.services:
            if found.setdefault(each.name, each) != each:
                raise TypeError(f"agent {spec.name} declares service {each.name} otherwise than another agent does")
    return found


def stages() -> list[str]:
    """The stages that tools are declared for, in the order of their names."""
    return sorted({tool.queue for spec in agents().values() for tool in spec.tools if tool.queue})


def agents() -> dict[str, AgentSpec]:
    """All agents by name."""
    return {**_found(), **_added}


def agent(name: str) -> AgentSpec:
    """The agent of that name. Raises UnknownAgent, naming those there are."""
    try:
        return agents()[name]
    except KeyError:
        raise UnknownAgent(f"no agent named {name!r}; there are: {', '.join(agents())}") from None
