"""Finds the agents: every `SPEC` in `agents/<name>/spec.py`. Adding a folder is all it takes."""

from __future__ import annotations

import traceback
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from holdfast.agent import AgentSpec
from holdfast.batch import BatchSpec
from holdfast.services import Service


class UnknownAgent(Exception):
    """No agent of that name."""


class BrokenAgent(Exception):
    """What is under `agents/` cannot be imported, or declares what cannot run. The message says where and why."""


_added: dict[str, AgentSpec] = {}
_added_batches: dict[str, BatchSpec] = {}


@cache
def _modules() -> list[ModuleType]:
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/spec.py"))
    return [_load(folder) for folder in folders]


def _load(folder: str) -> ModuleType:
    try:
        module = import_module(f"agents.{folder}.spec")
        if not isinstance(getattr(module, "SPEC", None), AgentSpec):
            raise TypeError("it has no SPEC = AgentSpec(…)")
    except Exception as error:
        raise _broken(f"agents/{folder}/spec.py", error) from error
    return module


def _broken(file: str, error: Exception) -> BrokenAgent:
    where = traceback.extract_tb(error.__traceback__)[-1]
    near = str(Path(file).parent)
    at = f" ({Path(where.filename).name}, line {where.lineno})" if f"/{near}/" in where.filename else ""
    return BrokenAgent(f"{file}: {type(error).__name__}: {error}{at}")


def load_graphs() -> None:
    """For who runs the agents: imports the graphs that specs only name.

    Raises BrokenAgent for a graph that cannot run, and for agents that disagree about a service.
    """
    from holdfast.turns import compiled  # costs the import of LangGraph

    _services()
    for spec in agents().values():
        if isinstance(spec.graph, str):
            try:
                compiled(spec.graph, spec.name)
            except Exception as error:
                raise _broken(spec.graph.partition(":")[0].replace(".", "/") + ".py", error) from error


@cache
def _found() -> dict[str, AgentSpec]:
    return {spec.name: spec for spec in sorted((each.SPEC for each in _named()), key=lambda spec: spec.name)}


@cache
def _found_batches() -> dict[str, BatchSpec]:
    return {each.BATCH.name: each.BATCH for each in _named() if hasattr(each, "BATCH")}


@cache
def _named() -> list[ModuleType]:
    """All specs. Raises BrokenAgent when a name is there twice, of agents or batches: one name starts one thing."""
    files: dict[str, str] = {}
    for module in _modules():
        file = f"{module.__name__.replace('.', '/')}.py"
        for name in (getattr(module, each).name for each in ("SPEC", "BATCH") if hasattr(module, each)):
            if name in files:
                raise BrokenAgent(f"{file}: the name {name!r} is taken by {files[name]}: give it one of its own")
            files[name] = file
    return _modules()


def add(spec: AgentSpec) -> AgentSpec:
    """Registers an agent that does not live under `agents/` (tests, benchmarks)."""
    _added[spec.name] = spec
    _services.cache_clear()
    return spec


def add_batch(spec: BatchSpec) -> BatchSpec:
    """Registers a batch that does not live under `agents/`, and its agent."""
    _added_batches[spec.name] = spec
    add(spec.agent)
    return spec


def service(name: str) -> Service:
    """What is declared of a service; the defaults when no agent says anything."""
    return _services().get(name) or Service(name)


@cache
def _services() -> dict[str, Service]:
    """Raises BrokenAgent when two agents disagree: a service has one breaker and one limit for all."""
    found: dict[str, Service] = {}
    servers: dict[str, object] = {}
    for spec in agents().values():
        for server in spec.mcp:
            if servers.setdefault(server.name, server.where) != server.where:
                raise BrokenAgent(f"agent {spec.name} finds MCP server {server.name} elsewhere than another agent does")
        for each in spec.services:
            if found.setdefault(each.name, each) != each:
                raise BrokenAgent(f"agent {spec.name} declares service {each.name} otherwise than another agent does")
    return found


def stages() -> list[str]:
    """The stages that tools and batches are declared for, in the order of their names."""
    tools = {tool.queue for spec in agents().values() for tool in spec.tools}
    return sorted((tools | {each.queue for each in batches().values()}) - {""})


def agents() -> dict[str, AgentSpec]:
    """All agents by name."""
    return {**_found(), **_added}


def agent(name: str) -> AgentSpec:
    """The agent of that name. Raises UnknownAgent, naming those there are."""
    try:
        return agents()[name]
    except KeyError:
        raise UnknownAgent(f"no agent named {name!r}; there are: {', '.join(agents())}") from None


def batches() -> dict[str, BatchSpec]:
    """All batches by name."""
    return {**_found_batches(), **_added_batches}


def batch(name: str) -> BatchSpec:
    """The batch of that name. Raises UnknownAgent, naming those there are."""
    try:
        return batches()[name]
    except KeyError:
        raise UnknownAgent(f"no batch named {name!r}; there are: {', '.join(batches())}") from None


def startable(name: str) -> AgentSpec | BatchSpec:
    """What a run of this name starts. Raises UnknownAgent, naming all there is."""
    found = batches().get(name) or agents().get(name)
    if found is None:
        raise UnknownAgent(f"no agent named {name!r}; there are: {', '.join([*agents(), *batches()])}")
    return found
