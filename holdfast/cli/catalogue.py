"""`starter.py agents` and `starter.py tools`: what is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from rich.text import Text

from holdfast.authoring.agent import AgentSpec, ToolServer
from holdfast.authoring.batch import BatchSpec
from holdfast.authoring.registry import agent as find_agent
from holdfast.authoring.registry import agents as all_agents
from holdfast.authoring.registry import batches as all_batches
from holdfast.authoring.registry import broken as broken_agents
from holdfast.authoring.registry import origin
from holdfast.authoring.tools import LastGood, Tool
from holdfast.cli.output import counted, out, print_json
from holdfast.contracts.data import Json
from holdfast.ext.mcp.hub import Hub

Down = dict[str, str]
"""MCP servers that cannot list their tools now, and why."""
ASK_S = 10.0
"""How long a server may take to start and list its tools."""


def _bound(specs: Iterable[AgentSpec]) -> list[tuple[AgentSpec, Down]]:
    """The agents with the tools that their MCP servers have now."""

    async def bind() -> list[tuple[AgentSpec, Down]]:
        hub = Hub()
        try:
            return await asyncio.gather(*(hub.bind(spec, ASK_S) for spec in specs))
        finally:
            await hub.close()

    return asyncio.run(bind())


def _missing(spec: AgentSpec, server: ToolServer, down: Down) -> str:
    """What is wrong with an MCP server: it does not answer, or lacks tools that the spec names."""
    if server.name in down:
        return f"its tools are not known now: {down[server.name]}"
    lost = server.lacks(spec.by_name)
    return f"the spec names tools that it does not have: {', '.join(lost)}" if lost else ""


def show_agents(as_json: bool) -> None:
    found = _bound(all_agents().values())
    if as_json:
        agents = [_agent(spec, down) for spec, down in found]
        broken = [{"name": name, "broken": str(error)} for name, error in broken_agents().items()]
        print_json([*agents, *map(_batch, all_batches().values()), *broken])
        return
    for spec, down in found:
        out.print(f"[bold]{spec.name}[/bold]  [dim]version {spec.version}[/dim]")
        out.print(f"  {spec.description}", markup=False)
        _show_origin(spec.name)
        out.print(f"  input  {', '.join(f'{n}: {_type(f)}' for n, f in _fields(spec).items())}", markup=False)
        steps = (step.name + ("" if step.critical else " (optional)") for step in spec.steps)
        if spec.steps:
            out.print(f"  steps  {', '.join(steps)}", markup=False)
        for server in spec.mcp:
            tools = ", ".join(name for name in spec.by_name if server.may_have(name))
            words = "; ".join(filter(None, (tools, _missing(spec, server, down))))
            out.print(f"  tools of MCP server {server.name}  {words}", markup=False)
    for batch in all_batches().values():
        out.print(f"[bold]{batch.name}[/bold]  [dim]batch of {batch.agent.name}, {batch.window} at a time[/dim]")
        out.print(f"  {batch.description}", markup=False)
        _show_origin(batch.name)
        out.print(f"  input  {', '.join(f'{n}: {_type(f)}' for n, f in _fields(batch).items())}", markup=False)
    _show_broken()


def _show_origin(name: str) -> None:
    if folder := origin(name):
        out.print(f"  from   {folder}", markup=False)


def _show_broken() -> None:
    for name, error in broken_agents().items():
        out.print(Text.assemble((name, "bold"), "  ", ("broken", "red"), f"  {error}"))


def _batch(spec: BatchSpec) -> Json:
    return {
        "name": spec.name,
        "batch_of": spec.agent.name,
        "from": origin(spec.name),
        "description": spec.description,
        "input": spec.input.model_json_schema(),
        "window": spec.window,
        "most_open": spec.most_open,
    }


def _agent(spec: AgentSpec, down: Down) -> Json:
    return {
        "name": spec.name,
        "version": spec.version,
        "description": spec.description,
        "from": origin(spec.name),
        "input": spec.input.model_json_schema(),
        "steps": [step.model_dump(mode="json") for step in spec.steps],
        "tools": list(spec.by_name),
        "mcp": [{"server": each.name, "problem": _missing(spec, each, down)} for each in spec.mcp],
        "max_turns": spec.max_turns,
        "deadline_s": spec.deadline.total_seconds(),
    }


def _fields(spec: AgentSpec | BatchSpec) -> Json:
    return spec.input.model_json_schema().get("properties", {})


def _type(schema: Json) -> str:
    return schema.get("type") or str(schema.get("$ref", "any")).rpartition("/")[2]


def show_tools(agent: str | None, as_json: bool) -> None:
    specs = [find_agent(agent)] if agent is not None else list(all_agents().values())
    found = _bound(specs)
    if as_json:
        print_json([{"agent": spec.name, **_tool(tool)} for spec, _ in found for tool in spec.tools])
        return
    for spec, down in found:
        out.print(f"[bold]{spec.name}[/bold]")
        for server in spec.mcp:
            if problem := _missing(spec, server, down):
                out.print(Text(f"  MCP server {server.name}: {problem}", "yellow"))
        for tool in spec.tools:
            whose = f"MCP server {tool.service}" if tool.remote else tool.service
            marks = [str(tool.effect), *filter(None, [whose]), f"{tool.timeout_s:g} s"]
            marks.append(counted(tool.retries, "retry", "retries"))
            marks += [f"stage {tool.queue}"] * bool(tool.queue)
            approval = f"needs approval by {tool.role}" if tool.role else "needs approval"
            marks += [approval] * tool.approval + ["can be undone"] * tool.policy.undo
            marks += [f"{tool.per_minute} a minute"] * (tool.per_minute is not None) + _fallbacks(tool)
            out.print(Text.assemble("  ", (tool.name, "cyan"), f"  version {tool.version} · {' · '.join(marks)}"))
            out.print(Text(f"      {tool.description.splitlines()[0]}", "dim"))
            arguments = ", ".join(
                f"{name}: {_type(field)}" for name, field in tool.schema.get("properties", {}).items()
            )
            out.print(Text(f"      {arguments}", "dim"))
    if agent is None:
        _show_broken()


def _fallbacks(tool: Tool) -> list[str]:
    names = ["last good result" if isinstance(each, LastGood) else each.name for each in tool.fallback]
    names += ["template"] * (tool.template_function is not None)
    return [f"else {', '.join(names)}"] if names else []


def _tool(tool: Tool) -> Json:
    return {
        "name": tool.name,
        "version": tool.version,
        "description": tool.description,
        "effect": tool.effect,
        "service": tool.service,
        "mcp": tool.remote,
        "timeout_s": tool.timeout_s,
        "deadline_s": tool.deadline_s,
        "retries": tool.retries,
        "approval": tool.approval,
        "role": tool.role,
        "undo": tool.policy.undo,
        "per_minute": tool.per_minute,
        "queue": tool.queue,
        "fallback": _fallbacks(tool),
        "arguments": tool.schema,
        "result": tool.result_schema,
    }
