"""Records histories for the replay test: `uv run python -m tests.histories.record [SCENARIO …]`.

The set was recorded with version 0.2.0. From there on histories are only ever added: a run that is in flight at a
deploy must go on with the new code. Without names the scenarios that have no file yet are recorded; one that has is
refused, so a new one needs a new name.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from temporalio.client import Client, WorkflowFailureError, WorkflowHandle

from holdfast.authoring.services import BreakerRule, Service
from holdfast.authoring.tools import ToolContext, tool
from holdfast.contracts.failures import ToolFailed
from holdfast.contracts.profile import Effect, StepSpec
from holdfast.contracts.recovery import Sweep, Swept
from holdfast.contracts.run import Phase
from holdfast.engine.client import DATA_CONVERTER
from holdfast.recovery.dead_letters import DeadLetters
from holdfast.recovery.requests import repair_of, start_repair
from holdfast.state.schema import migrate
from holdfast.testing.model import call, error, say, sequence, turn
from holdfast.testing.stage import Stage, a_stage, dev_server, until
from tests.fixtures.batch import Batch, Work, names
from tests.fixtures.temporal import temporal_cli
from tests.fixtures.world import World, agent

HERE = Path(__file__).parent
Handle = WorkflowHandle[Any, Any]
Scenario = Callable[[Stage, World], Awaitable[Handle]]

BOOK, SEND = ("book", {"n": 1}), ("send", {"n": 2})


async def completed(stage: Stage, world: World) -> Handle:
    """Parallel calls, a retry, an approval, an ignored decision, a refused finish."""
    flaky = world.tool("flaky", Effect.PROBE, errors=[ConnectionRefusedError("once")])
    flaky.probe(lambda ctx, n: None)
    spec = agent(world.tool("book"), flaky, world.tool("send", approval=True))
    stage.model.script = sequence(call(BOOK, ("flaky", {})), say("too early"), call(SEND), say("done"))
    handle = await stage.start(spec)
    await asked(handle)
    await handle.signal("decide", "nonsense")
    await decide(handle, "a3")
    return handle


async def partial(stage: Stage, world: World) -> Handle:
    order = world.tool("order", errors=[ToolFailed("out of stock")])
    steps = [
        StepSpec(name="pharmacy", tools=["order"], critical=False, role="pharmacist"),
        StepSpec(name="book", tools=["book"]),
    ]
    spec = agent(order, world.tool("book"), steps=steps)
    stage.model.script = sequence(call(("order", {}), BOOK), say("all but the pharmacy"))
    return await stage.start(spec)


async def rejected(stage: Stage, world: World) -> Handle:
    handle = await waiting(stage, world)
    await decide(handle, "a2", verdict="reject", comment="wrong dose")
    return handle


async def cancelled(stage: Stage, world: World) -> Handle:
    handle = await waiting(stage, world)
    await handle.cancel()
    return handle


async def cancelled_in_flight(stage: Stage, world: World) -> Handle:
    """Cancelled with a tool in flight beside an approval."""
    gate = asyncio.Event()
    spec = agent(world.tool("send", approval=True), world.tool("slow", gate=gate))
    stage.model.script = sequence(call(SEND, ("slow", {})))
    handle = await stage.start(spec)
    await world.saw("begin slow#2")
    await asked(handle)
    await handle.cancel()
    asyncio.get_running_loop().call_later(1.0, gate.set)
    return handle


async def failed(stage: Stage, world: World) -> Handle:
    spec = agent(world.tool("book"), world.tool("pay", errors=[ToolFailed("account closed")]))
    stage.model.script = sequence(call(BOOK), call(("pay", {})))
    return await stage.start(spec)


async def parked(stage: Stage, world: World) -> Handle:
    """The model was gone for a while."""
    answering, tries = sequence(call(BOOK), say("done")), iter([error(401)])
    stage.model.script = lambda m: (next(tries, None) if turn(m) == 2 else None) or answering(m)
    return await stage.start(agent(world.tool("book")))


async def waiting(stage: Stage, world: World) -> Handle:
    spec = agent(world.tool("book"), world.tool("send", approval=True))
    stage.model.script = sequence(call(BOOK), call(SEND), say("ended"))
    handle = await stage.start(spec)
    await asked(handle)
    return handle


async def continued(stage: Stage, world: World) -> Handle:
    """Continue-as-new at every turn, and once while an approval is open."""
    gate = asyncio.Event()
    spec = agent(
        world.tool("book"), world.tool("send", approval=True), world.tool("slow", gate=gate), turns_per_execution=1
    )
    stage.model.script = sequence(call(BOOK), call(SEND, ("slow", {})), say("done"))
    handle = await stage.start(spec)
    await asked(handle)
    before = (await handle.describe()).run_id
    gate.set()
    while (await handle.describe()).run_id == before:
        await asyncio.sleep(0.02)
    await decide(handle, "a2")
    return handle


async def settled(stage: Stage, world: World) -> Handle:
    """Two outcomes that a person settles while the run waits to end: the first did not happen, the second did."""
    send = world.tool("send", Effect.MANUAL, errors=[TimeoutError("no answer"), TimeoutError("no answer")], undo=None)
    stage.model.script = sequence(call(SEND), say("sent, perhaps"), call(SEND), say("sent, perhaps"), say("done"))
    handle = await stage.start(agent(send))
    for approval, verdict in (("o1", "did_not"), ("o2", "happened")):
        await until(handle, lambda s, it=approval: s.phase is Phase.WAITING_HUMAN and s.approvals[0].id == it)
        await decide(handle, approval, verdict=verdict, comment="looked into the outbox")
    return handle


async def deferred(stage: Stage, world: World) -> Handle:
    """A call whose service's breaker opens: deferred, and tried again while the run waits to end."""
    rule = BreakerRule(failures=1, probe_after_s=2.0)
    spec = agent(
        world.tool("book", errors=[ConnectionRefusedError("down")]), services=(Service("world", breaker=rule),)
    )
    stage.model.script = sequence(call(BOOK), say("all but the booking"), say("done"))
    return await stage.start(spec)


async def repaired(stage: Stage, world: World) -> Handle:
    """A dead letter that a person has replayed."""
    order = world.tool("order", errors=[ToolFailed("closed")])
    step = StepSpec(name="pharmacy", tools=["order"], critical=False, role="pharmacist")
    stage.model.script = sequence(call(("order", {})), say("all but the pharmacy"))
    await (await stage.start(agent(order, steps=[step]))).result()
    (letter,) = await DeadLetters(stage.runtime.db).find()
    repair = await repair_of(letter, stage.runtime.db, "dr.lee")
    return await start_repair(stage.client, repair, stage.queue)


async def swept(stage: Stage, world: World) -> Handle:
    """A sweep that finds a terminated run."""
    await (await waiting(stage, world)).terminate("by hand")
    return await stage.client.start_workflow(
        "OrphanSweep", Sweep(grace_s=0), id=f"sweep-{uuid.uuid4().hex[:8]}", task_queue=stage.queue, result_type=Swept
    )


async def unwound(stage: Stage, world: World) -> Handle:
    """What that sweep starts: the run is undone, and its end recorded."""
    found = await (await swept(stage, world)).result()
    return stage.client.get_workflow_handle(found.found[0])


async def with_webhook(stage: Stage, world: World) -> Handle:
    """A run that sends a webhook when it asks a person, and one when it ends."""
    spec = agent(world.tool("send", approval=True))
    stage.model.script = sequence(call(SEND), say("done"))
    handle = await stage.start(spec, webhook="http://127.0.0.1:9/hook")
    await asked(handle)
    await decide(handle, "a1")
    return handle


async def undelivered(stage: Stage, world: World) -> Handle:
    """The delivery that the end of such a run starts: it fails, and becomes a dead letter."""
    spec = agent(world.tool("book"))
    stage.model.script = sequence(call(BOOK), say("done"))
    handle = await stage.start(spec, webhook="http://127.0.0.1:9/hook")
    await handle.result()
    while not (found := await DeadLetters(stage.runtime.db).find()):
        await asyncio.sleep(0.02)
    return stage.client.get_workflow_handle(found[0].key.replace("/", "-"))


async def batch(stage: Stage, world: World) -> Handle:
    """Children that wait while a service is down, one that fails, continue-as-new."""
    up = asyncio.Event()

    @tool(effect=Effect.IDEMPOTENT, service="history", deferrable=False, retries=50)
    async def think(ctx: ToolContext, name: str) -> str:
        """Thinks."""
        if not up.is_set():
            raise ConnectionRefusedError("down")
        if name == "n05":
            raise ToolFailed("no name")
        return "thought"

    def script(messages: list[dict[str, Any]]) -> Any:
        return say("done") if turn(messages) > 1 else call(("think", {"name": messages[1]["content"]}))

    stage.model.script = script
    services = (Service("history", breaker=BreakerRule(failures=1, probe_after_s=2.0)),)
    spec = agent(think, input=Work, prompt=lambda given: given.name, services=services)
    handle = await Batch.of(spec, window=2, most_open=3, items_per_execution=4).start(stage, names(10))
    await until(handle, lambda s: s.items is not None and s.items.parked == 3)
    up.set()
    return handle


async def batch_item(stage: Stage, world: World) -> Handle:
    """The first child of such a batch. It has sent the batch two Signals."""
    handle = await batch(stage, world)
    await handle.result()
    return stage.client.get_workflow_handle(f"{handle.id}.n00")


async def batch_cancelled(stage: Stage, world: World) -> Handle:
    """Cancelled with children that wait for a person, and undo what they did."""
    spec = agent(world.tool("book"), world.tool("send", approval=True), input=Work)
    stage.model.script = sequence(call(BOOK), call(SEND))
    handle = await Batch.of(spec, window=2, most_open=3).start(stage, names(5))
    await until(handle, lambda s: s.items is not None and s.items.parked == 3)
    await handle.cancel()
    return handle


async def together(stage: Stage, world: World) -> Handle:
    """Two decisions and a message that one workflow task brings."""
    spec = agent(world.tool("send", approval=True))
    stage.model.script = sequence(call(SEND, SEND), say("done"))
    handle = await stage.start(spec)
    await until(handle, lambda s: len(s.approvals) == 2)
    hello = handle.signal("message", {"text": "the family arrives at noon", "by": "nurse.kim"})
    await asyncio.gather(decide(handle, "a1"), hello, decide(handle, "a2"))
    events = (await handle.fetch_history()).events
    signals = [e.event_id for e in events if e.HasField("workflow_execution_signaled_event_attributes")]
    # The first brings the task's scheduling, which stands between it and the rest.
    assert signals[-1] - signals[0] <= len(signals), "not in one task this time: record it again"
    return handle


async def withdrawn(stage: Stage, world: World) -> Handle:
    """A tool that was withdrawn is offered again; its call is deferred, and a person settles it meanwhile."""
    await stage.runtime.guards.breaker.trip("world", "moving house", "lee")
    stage.model.script = sequence(say("I cannot book"), call(BOOK), say("all but the booking"), say("done"))
    handle = await stage.start(agent(world.tool("book")))
    await asked(handle)
    await decide(handle, "o1", verdict="happened", comment="by telephone")
    return handle


async def asked_twice(stage: Stage, world: World) -> Handle:
    """A call that was deferred and then ended unknown: two questions."""
    rule = BreakerRule(failures=1, probe_after_s=2.0)
    errors = [ConnectionRefusedError("down"), TimeoutError("no answer")]
    send = world.tool("send", Effect.MANUAL, errors=errors, undo=None)
    stage.model.script = sequence(call(SEND), say("sent, perhaps"), say("done"))
    handle = await stage.start(agent(send, services=(Service("world", breaker=rule),)))
    await until(handle, lambda s: [each.id for each in s.approvals] == ["o1-2"])
    await decide(handle, "o1-2", verdict="happened", comment="looked into the outbox")
    return handle


async def dropped(stage: Stage, world: World) -> Handle:
    """Cancelled while a read is under way beside an effect."""
    gate = asyncio.Event()
    spec = agent(world.tool("look", Effect.READ, gate=asyncio.Event()), world.tool("slow", gate=gate))
    stage.model.script = sequence(call(("look", {}), ("slow", {})))
    handle = await stage.start(spec)
    await world.saw("begin look#1")
    await world.saw("begin slow#2")
    await handle.cancel()
    asyncio.get_running_loop().call_later(1.0, gate.set)
    return handle


async def early(stage: Stage, world: World) -> Handle:
    """A decision that comes before the run asks: ignored, and sent again."""
    gate = asyncio.Event()
    look = world.tool("look", Effect.READ, gate=gate)
    stage.model.script = sequence(call(("look", {})), call(SEND), say("done"))
    handle = await stage.start(agent(look, world.tool("send", approval=True)))
    await world.saw("begin look#1")
    await decide(handle, "a2")
    await until(handle, lambda s: bool(s.notes))
    gate.set()
    await asked(handle)
    await decide(handle, "a2")
    return handle


async def looked_back(stage: Stage, world: World) -> Handle:
    """Cancelled, undone, and then reset to before the cancel: it looks back, and books again."""
    stage.model.script = sequence(call(BOOK), call(SEND), call(BOOK), call(SEND), say("done"))
    handle = await stage.start(agent(world.tool("book"), world.tool("send", approval=True)))
    await asked(handle)
    tasks = [e for e in (await handle.fetch_history()).events if e.HasField("workflow_task_completed_event_attributes")]
    await handle.cancel()
    with suppress(WorkflowFailureError):
        await handle.result()
    where = ("--workflow-id", handle.id, "--event-id", str(tasks[-1].event_id), "--reason", "recorded")
    assert (await temporal_cli(stage, "workflow", "reset", *where)).returncode == 0
    described = await stage.client.get_workflow_handle(handle.id).describe()
    handle = stage.client.get_workflow_handle(handle.id, run_id=described.run_id)
    await until(handle, lambda s: any(each.id != "a2" for each in s.approvals))
    (again,) = await handle.query("approvals")
    await decide(handle, again["id"])
    return handle


SCENARIOS: list[Scenario] = [
    completed,
    partial,
    rejected,
    cancelled,
    cancelled_in_flight,
    failed,
    parked,
    waiting,
    continued,
    settled,
    deferred,
    repaired,
    swept,
    unwound,
    with_webhook,
    undelivered,
    batch,
    batch_item,
    batch_cancelled,
    together,
    withdrawn,
    asked_twice,
    dropped,
    early,
    looked_back,
]


async def asked(handle: Handle) -> None:
    await until(handle, lambda s: bool(s.approvals))


async def decide(handle: Handle, approval: str, **more: str) -> None:
    decision = {"approval_id": approval, "verdict": "approve", "approver": "dr.lee", **more}
    await handle.signal("decide", decision)


def without_this_machine(value: Any) -> Any:
    """The history without stack traces, which name the paths of the machine that recorded it."""
    if isinstance(value, dict):
        return {name: without_this_machine(each) for name, each in value.items() if name != "stackTrace"}
    return [without_this_machine(each) for each in value] if isinstance(value, list) else value


async def record(client: Client, scenario: Scenario) -> None:
    with tempfile.TemporaryDirectory() as home:
        store = f"sqlite:///{home}/holdfast.db"
        migrate(store)
        async with a_stage(client, store) as stage, stage.worker(identity="recorder"):
            handle = await scenario(stage, World())
            described = (await handle.describe()).raw_description.workflow_execution_info
            run_id: str | None = handle.run_id or described.first_run_id  # a reset run is not the first
            if scenario is not waiting:
                try:
                    await handle.result()
                except WorkflowFailureError as end:
                    print(f"{scenario.__name__}: {end.cause}")
            number = 0
            while run_id:
                number += 1
                history = await client.get_workflow_handle(handle.id, run_id=run_id).fetch_history()
                name = scenario.__name__ + (f"_{number}" if scenario in (continued, batch) else "")
                text = json.dumps(without_this_machine(history.to_json_dict()), indent=1, ensure_ascii=False)
                with (HERE / f"{name}.json").open("x") as file:
                    file.write(text + "\n")
                last = history.events[-1].workflow_execution_continued_as_new_event_attributes
                run_id = last.new_execution_run_id or None
            if scenario is waiting:
                await handle.terminate()


async def main(names: list[str]) -> int:
    there = {
        s.__name__: any(HERE.glob(f"{s.__name__}.json")) or any(HERE.glob(f"{s.__name__}_1.json")) for s in SCENARIOS
    }
    if wrong := [name for name in names if there.get(name, True)]:
        print(f"not recorded: {', '.join(wrong)}: no such scenario, or its history is there and is never replaced")
        return 2
    async with await dev_server(data_converter=DATA_CONVERTER) as env:
        where = env.client.service_client.config.target_host
        client = await Client.connect(where, data_converter=DATA_CONVERTER, identity="recorder")
        for scenario in SCENARIOS:
            if scenario.__name__ in names or (not names and not there[scenario.__name__]):
                await record(client, scenario)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
