"""One side as a process, worker and client in one: `python -m bench.cost.side bare|agent`.

Takes commands as JSON lines on stdin and answers each with a JSON line on stdout. Addresses come from the environment.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import uvloop
from temporalio.client import Client, WorkflowHandle
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Worker

from bench.cost import bare, task
from bench.cost.agent import SPEC
from holdfast.cli.ending import end_process
from holdfast.engine.client import connect, profile
from holdfast.engine.runtime import open_runtime
from holdfast.engine.starting import start_run
from holdfast.engine.worker import SETTINGS
from holdfast.reasoning.model_client import ModelClient
from holdfast.settings import settings
from holdfast.state.runs import Runs
from workflows.serving import make_worker

QUEUE = f"bench-{os.getpid()}"
RUN_S = 300
TURN_BEGINS = ("plan", "model")
"""The activities that a turn begins with."""


@dataclass
class Side:
    client: Client
    worker: Worker
    begin: Callable[[str, int, bool], Awaitable[WorkflowHandle[Any, Any]]]
    """`await begin(name, turns, gate)` starts a run."""


async def open_bare() -> Side:
    client = await Client.connect(profile().address or "", data_converter=pydantic_data_converter)
    work = bare.Activities(ModelClient(settings()))

    async def begin(name: str, turns: int, gate: bool) -> WorkflowHandle[Any, Any]:
        return await client.start_workflow(bare.BareLoop.run, task.prompt(name, turns, gate), id=name, task_queue=QUEUE)

    worker = Worker(client, workflows=[bare.BareLoop], activities=[work.model, work.tool], task_queue=QUEUE, **SETTINGS)
    return Side(client, worker, begin)


async def open_agent() -> Side:
    client, runtime = await connect(), await open_runtime(settings())
    runs = Runs(runtime.db)

    async def begin(name: str, turns: int, gate: bool) -> WorkflowHandle[Any, Any]:
        work = {"name": name, "turns": turns, "gate": gate}
        started = await start_run(client, runs, SPEC.name, work, task_queue=QUEUE, request_key=name)
        return client.get_workflow_handle(started.workflow_id)

    return Side(client, make_worker(client, QUEUE, runtime), begin)


def _name() -> str:
    return f"b-{uuid.uuid4().hex[:8]}"


async def _one(side: Side, turns: int) -> WorkflowHandle[Any, Any]:
    """A run from start to end. Raises RuntimeError when it did not do the work."""
    handle = await side.begin(_name(), turns, False)
    async with asyncio.timeout(RUN_S):
        result = await handle.result()
    if (result["summary"] if isinstance(result, dict) else result) != task.final(turns):
        raise RuntimeError(f"run {handle.id} ended with {result}")
    return handle


async def run(side: Side, agents: int, turns: int) -> dict[str, Any]:
    """So many agents at once: wall seconds, CPU seconds of this process, its peak memory in MB."""
    cpu, start = _cpu(), time.perf_counter()
    await asyncio.gather(*(_one(side, turns) for _ in range(agents)))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "cpu": _cpu() - cpu, "rss_mb": peak}


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def history(side: Side, turns: int) -> dict[str, Any]:
    """One run's history over all its executions: bytes as the server counts them, and bytes of events by turn."""
    handle = await _one(side, turns)
    run_id: str | None = None
    total, executions, events = 0, 0, []
    while run_id != "":
        execution = side.client.get_workflow_handle(handle.id, run_id=run_id)
        total += (await execution.describe()).raw_description.workflow_execution_info.history_size_bytes
        here = list((await execution.fetch_history()).events)
        executions, events = executions + 1, here + events
        run_id = here[0].workflow_execution_started_event_attributes.continued_execution_run_id
    by_turn: list[int] = []
    for event in events:
        if event.activity_task_scheduled_event_attributes.activity_type.name in TURN_BEGINS:
            by_turn.append(0)
        if by_turn:
            by_turn[-1] += event.ByteSize()
    return {"bytes": total, "events": len(events), "executions": executions, "by_turn": by_turn}


async def signal(side: Side, runs: int, turns: int) -> dict[str, Any]:
    """Milliseconds from a decision to the first line of the tool that it allows, one run after another."""
    found: list[float] = []
    for _ in range(runs):
        name = _name()
        handle = await side.begin(name, turns, True)
        async with asyncio.timeout(RUN_S):
            while not (open_ := await handle.query("approvals")):
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)  # the workflow task that asked is over, as it would be hours later
        start = time.perf_counter()
        await handle.signal("decide", {"approval_id": open_[0]["id"], "verdict": "approve", "approver": "bench"})
        await handle.result()
        found.append((task.released[name] - start) * 1e3)
    return {"ms": found}


async def serve(kind: str) -> None:
    side = await {"bare": open_bare, "agent": open_agent}[kind]()
    commands = {"run": run, "history": history, "signal": signal}
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Temporal's native part logs to stdout
    async with side.worker:
        answers.write("{}\n")  # ready
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            answers.write(json.dumps(await commands[command.pop("do")](side, **command)) + "\n")


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
    end_process(0)
