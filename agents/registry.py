"""Finds the agents: every `SPEC` in `agents/<name>/spec.py`. Adding a folder is all it takes.

One that is broken is listed as such, and stops no other.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from holdfast.agent import AgentSpec
from holdfast.batch import BatchSpec
from holdfast.reliability.errors import MESSAGE_LIMIT, ErrorType, Failure
from holdfast.services import Service
from holdfast.wording import did_you_mean

T = TypeVar("T")


class UnknownAgent(Exception):
    """No agent of that name."""


class BrokenAgent(Exception):
    """An agent under `agents/` cannot be imported, or declares what cannot run. The message says where and why.

    The others are not concerned. Whatever needs this one waits until it is mended: nothing of it is given up.
    """

    @property
    def failure(self) -> Failure:
        """As `holdfast.reliability.errors.classify` takes it."""
        return Failure(ErrorType.INTERNAL, f"its agent is broken: {self}"[:MESSAGE_LIMIT], retry=True)


_added: dict[str, AgentSpec] = {}
_added_batches: dict[str, BatchSpec] = {}


@dataclass
class _Found:
    """What is under `agents/`. `broken` is by folder."""

    agents: dict[str, AgentSpec] = field(default_factory=dict)
    batches: dict[str, BatchSpec] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Where each name comes from."""
    broken: dict[str, BrokenAgent] = field(default_factory=dict)

    def take(self, folder: str) -> None:
        """Adds what a folder declares. Raises BrokenAgent when that cannot be, and adds nothing then."""
        file = f"agents/{folder}/spec.py"
        try:
            module = import_module(f"agents.{folder}.spec")
            spec, batch = getattr(module, "SPEC", None), getattr(module, "BATCH", None)
            if not isinstance(spec, AgentSpec):
                raise TypeError("it has no SPEC = AgentSpec(…)")
        except (Exception, SystemExit) as error:
            raise _broken(file, error) from error
        names = [each.name for each in (spec, batch) if each is not None]
        for n, name in enumerate(names):
            if name in self.files or name in names[:n]:
                where = self.files.get(name, file)
                raise BrokenAgent(f"{file}: the name {name!r} is taken by {where}: give it one of its own")
        _services_of([*self.agents.values(), spec])
        self.agents[spec.name] = spec
        if batch is not None:
            self.batches[batch.name] = batch
        self.files |= dict.fromkeys(names, file)


def _broken(file: str, error: BaseException) -> BrokenAgent:
    near = f"/{Path(file).parent}/"
    where = [each for each in traceback.extract_tb(error.__traceback__) if near in each.filename]
    at = f" ({Path(where[-1].filename).name}, line {where[-1].lineno})" if where else ""
    return BrokenAgent(f"{file}: {type(error).__name__}: {error}{at}")


@cache
def _found() -> _Found:
    found = _Found()
    for folder in sorted(path.parent.name for path in Path(__file__).parent.glob("*/spec.py")):
        try:
            found.take(folder)
        except BrokenAgent as error:
            found.broken[folder] = error
    found.agents = dict(sorted(found.agents.items()))
    return found


def broken() -> dict[str, BrokenAgent]:
    """What is under `agents/` and cannot be used, by the folder's name."""
    return _found().broken


def none_is_broken() -> None:
    """Raises the BrokenAgent of one that is."""
    for error in broken().values():
        raise error


def load_graphs() -> None:
    """For who runs the agents: imports the graphs that specs only name. One that cannot run makes its agent broken.

    Raises BrokenAgent when agents that do not live under `agents/` disagree about a service.
    """
    from holdfast.turns import compiled  # costs the import of LangGraph

    _services()
    for name, spec in agents().items():
        if isinstance(spec.graph, str):
            try:
                compiled(spec.graph, name)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - an agent's own code; it is kept and shown
                found = _found()
                found.broken[name] = _broken(spec.graph.partition(":")[0].replace(".", "/") + ".py", error)
                for where in (_added, found.agents):
                    where.pop(name, None)
                for batches in (_added_batches, found.batches):
                    for batch in [each for each in batches.values() if each.agent.name == name]:
                        del batches[batch.name]


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
    return _services_of(agents().values())


def _services_of(specs: Iterable[AgentSpec]) -> dict[str, Service]:
    """Raises BrokenAgent when two agents disagree: a service has one breaker and one limit for all."""
    found: dict[str, Service] = {}
    servers: dict[str, object] = {}
    for spec in specs:
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
    """All agents by name, without the broken ones."""
    return {**_found().agents, **_added}


def agent(name: str) -> AgentSpec:
    """The agent of that name. Raises UnknownAgent, naming those there are; BrokenAgent for one that is broken."""
    return _known(name, agents(), "agent")


def batches() -> dict[str, BatchSpec]:
    """All batches by name."""
    return {**_found().batches, **_added_batches}


def batch(name: str) -> BatchSpec:
    """The batch of that name. Raises UnknownAgent, naming those there are; BrokenAgent for one that is broken."""
    return _known(name, batches(), "batch")


def startable(name: str) -> AgentSpec | BatchSpec:
    """What a run of this name starts. Raises UnknownAgent, naming all there is; BrokenAgent for one that is broken."""
    return _known(name, {**agents(), **batches()}, "agent")


def _known(name: str, there: Mapping[str, T], what: str) -> T:
    if name in there:
        return there[name]
    if name in broken():
        raise broken()[name]
    words = f"no {what} named {name!r}; there are: {', '.join(there)}{did_you_mean(name, there)}"
    if broken():  # their names cannot be known
        raise BrokenAgent(f"{words}; it may be one that is broken: {'; '.join(map(str, broken().values()))}")
    raise UnknownAgent(words)
