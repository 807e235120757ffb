"""Finds the agents: every `SPEC` in `<name>/spec.py` of a place of agents. To add an agent, add a folder.

A broken agent is listed as broken and does not affect the others.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from holdfast.authoring.agent import AgentSpec
from holdfast.authoring.batch import BatchSpec
from holdfast.authoring.places import SHIPPED, Place, file_of, places
from holdfast.authoring.services import Service
from holdfast.contracts.failures import MESSAGE_LIMIT, ErrorType, Failure
from holdfast.contracts.wording import did_you_mean

T = TypeVar("T")


class UnknownAgent(Exception):
    """No agent of that name."""


class BrokenAgent(Exception):
    """An agent cannot be imported, or its declaration cannot run. The message says where and why.

    Other agents are not affected. Runs of the broken agent wait until it is repaired; none of them fails.
    """

    @property
    def failure(self) -> Failure:
        """The failure, in the form that `holdfast.reliability.errors.classify` takes."""
        return Failure(ErrorType.INTERNAL, f"its agent is broken: {self}"[:MESSAGE_LIMIT], retry=True)


_added: dict[str, AgentSpec] = {}
_added_batches: dict[str, BatchSpec] = {}


@dataclass
class _Found:
    """The contents of all places. `broken` is by folder."""

    agents: dict[str, AgentSpec] = field(default_factory=dict)
    batches: dict[str, BatchSpec] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """The file that declares each name."""
    homes: dict[str, Place] = field(default_factory=dict)
    """The place of each name."""
    broken: dict[str, BrokenAgent] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    """The file of each module that was to be imported."""

    def take(self, place: Place, folder: str) -> None:
        """Adds the agent and the batch that a folder declares. Adds nothing and raises BrokenAgent when it cannot."""
        file, name = place.shown(f"{folder}/spec.py"), f"{place.package}.{folder}.spec"
        if (other := self.modules.setdefault(name, file)) != file:
            raise BrokenAgent(f"{file}: the folder name {folder!r} is taken by {other}: give it one of its own")
        try:
            module = import_module(name)
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
        self.homes |= dict.fromkeys(names, place)


def _broken(file: str, error: BaseException) -> BrokenAgent:
    near = f"/{'/'.join(Path(file).parent.parts[-2:])}/"
    where = [each for each in traceback.extract_tb(error.__traceback__) if near in each.filename]
    at = f" ({Path(where[-1].filename).name}, line {where[-1].lineno})" if where else ""
    return BrokenAgent(f"{file}: {type(error).__name__}: {error}{at}")


@cache
def _found() -> _Found:
    found = _Found(broken={name: BrokenAgent(why) for name, why in places().lacking.items()})
    for place in places().there:
        for folder in place.having("spec.py"):
            try:
                found.take(place, folder)
            except BrokenAgent as error:
                found.broken[folder if folder not in found.broken else str(place.folder / folder)] = error
    found.agents = dict(sorted(found.agents.items()))
    return found


def origin(name: str) -> str:
    """The folder with the agents among which an agent or a batch is; empty for those of `agents/`."""
    home = _found().homes.get(name, SHIPPED)
    return "" if home == SHIPPED else str(home.folder)


def file_with(name: str, graph: object) -> str:
    """The file that has an agent's graph: that of the module which it is named in, or the agent's own spec."""
    if isinstance(graph, str):
        return file_of(graph.partition(":")[0])
    return _found().files.get(name, f"agents/{name}/spec.py")


def broken() -> dict[str, BrokenAgent]:
    """The broken agents by folder name, and places where no agents can be."""
    return _found().broken


def none_is_broken() -> None:
    """Raises the BrokenAgent of the first broken agent, if there is one."""
    for error in broken().values():
        raise error


def breaks(name: str, file: str, error: BaseException) -> None:
    """Removes an agent that turned out to be broken, with its batches. `file`: where its code is."""
    found = _found()
    found.broken[name] = _broken(file, error)
    for where in (_added, found.agents):
        where.pop(name, None)
    for batches in (_added_batches, found.batches):
        for batch in [each for each in batches.values() if each.agent.name == name]:
            del batches[batch.name]


def add(spec: AgentSpec) -> AgentSpec:
    """Registers an agent from outside `agents/` (tests, benchmarks)."""
    _added[spec.name] = spec
    services.cache_clear()
    return spec


def add_batch(spec: BatchSpec) -> BatchSpec:
    """Registers a batch from outside `agents/`, and its agent."""
    _added_batches[spec.name] = spec
    add(spec.agent)
    return spec


def service(name: str) -> Service:
    """Returns the declaration of a service, or the defaults when no agent declares it."""
    return services().get(name) or Service(name)


@cache
def services() -> dict[str, Service]:
    """Everything that agents declare of services, by name. Raises BrokenAgent when two agents disagree."""
    return _services_of(agents().values())


def _services_of(specs: Iterable[AgentSpec]) -> dict[str, Service]:
    """Collects the declared services. Raises BrokenAgent when two agents declare one differently.

    All agents share a service's circuit breaker and rate limit.
    """
    found: dict[str, Service] = {}
    servers: dict[str, object] = {}
    for spec in specs:
        for server in spec.mcp:
            if servers.setdefault(server.name, server.where) != server.where:
                raise BrokenAgent(
                    f"agent {spec.name} declares MCP server {server.name} differently from another agent:"
                    " declare it the same way in both"
                )
        for each in spec.services:
            if found.setdefault(each.name, each) != each:
                raise BrokenAgent(
                    f"agent {spec.name} declares service {each.name} differently from another agent:"
                    " declare it the same way in both"
                )
    return found


def stages() -> list[str]:
    """Returns the stages that tools and batches name, sorted."""
    tools = {tool.queue for spec in agents().values() for tool in spec.tools}
    return sorted((tools | {each.queue for each in batches().values()}) - {""})


def agents() -> dict[str, AgentSpec]:
    """Returns all agents by name, without the broken ones."""
    return {**_found().agents, **_added}


def agent(name: str) -> AgentSpec:
    """Returns the agent of that name. Raises UnknownAgent with the known names, or BrokenAgent."""
    return _known(name, agents(), "agent")


def batches() -> dict[str, BatchSpec]:
    """Returns all batches by name."""
    return {**_found().batches, **_added_batches}


def batch(name: str) -> BatchSpec:
    """Returns the batch of that name. Raises UnknownAgent with the known names, or BrokenAgent."""
    return _known(name, batches(), "batch")


def startable(name: str) -> AgentSpec | BatchSpec:
    """Returns the agent or batch of that name. Raises UnknownAgent with the known names, or BrokenAgent."""
    return _known(name, {**agents(), **batches()}, "agent")


def _known(name: str, there: Mapping[str, T], what: str) -> T:
    if name in there:
        return there[name]
    if name in broken():
        raise broken()[name]
    words = f"no {what} named {name!r}; there are: {', '.join(there)}{did_you_mean(name, there)}"
    if broken():  # the name of a broken agent is unknown: its spec could not be read
        raise BrokenAgent(f"{words}; it may be one of the broken agents: {'; '.join(map(str, broken().values()))}")
    raise UnknownAgent(words)
