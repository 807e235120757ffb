"""A name with a slip in it is refused with the name that is meant, whatever it names."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from uuid import uuid4

import pytest

from holdfast.authoring.agent import AgentSpec
from holdfast.cli.output import Refused
from holdfast.cli.settle import _open_end  # pyright: ignore[reportPrivateUsage]
from holdfast.contracts.profile import StepSpec
from holdfast.contracts.run import Pending, RunOutcome, RunResult
from holdfast.contracts.wording import ID, did_you_mean
from holdfast.dev.stack import ROOT, Stack
from holdfast.recovery.dead_letters import DeadLetter, DeadLetters
from holdfast.state.opening import open_database
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.stack import Cli
from tests.fixtures.world import World
from tests.system.cli.test_runs import parsed, start_and_wait_for_the_question


@pytest.fixture
def run(cli: Cli) -> Iterator[str]:
    run = start_and_wait_for_the_question(cli, f"meant-{uuid4().hex[:8]}")
    yield run
    cli("cancel", run)


def hint(done: subprocess.CompletedProcess[str], meant: str, code: int = 2) -> None:
    said = done.stderr if code else done.stdout
    assert done.returncode == code, done.stderr
    assert len(said.strip().splitlines()) == 1 or not code
    assert f"id you mean {meant}" in said, said


def test_runs_and_what_they_ask(cli: Cli, run: str) -> None:
    slip = f"{run[:-4]}{run[-3:]}"
    for command in (("status",), ("result",), ("cancel",), ("approve",), ("message", "hello")):
        hint(cli(command[0], slip, *command[1:]), run)
    asked = parsed(cli, "approvals", run)[0]["approval"]["id"]
    hint(cli("approve", run, f"{asked}.", "--by", "dr.lee"), asked)
    hint(cli("edit", run, asked.upper(), "--set", "text=x", "--by", "dr.lee"), asked)
    hint(cli("approvals", "--role", "pharmcist"), "pharmacist", code=0)
    assert "did you mean" not in cli("approvals", "--role", "pharmacist").stdout


def test_commands_agents_breakers_and_stages(cli: Cli, stack: Stack) -> None:
    hint(cli("approvls"), "'approvals'")
    hint(cli("breakers", "rest", "x"), "'reset'")
    hint(cli("tools", "dischrge"), "discharge")
    hint(cli("breakers", "trip", "pharmcy", "--why", "a slip"), "pharmacy", code=0)
    hint(cli("breakers", "reset", "pharmc"), "pharmcy")
    assert cli("breakers", "reset", "pharmcy").returncode == 0
    worker = [sys.executable, str(ROOT / "worker.py"), "--queue", "extrct"]
    hint(
        subprocess.run(worker, env=stack.environment, capture_output=True, text=True, timeout=PATIENCE_S),
        "extract",
    )


def test_dead_letters(cli: Cli, stack: Stack) -> None:
    id = f"call-{uuid4().hex[:10]}"
    letter = DeadLetter(
        id, "call", "open", "discharge", "default", "discharge-gone", "k", "k/1", "order_medication", "", "it is", "{}"
    )

    async def change(drop: bool) -> None:
        db = await open_database(stack.store_url)
        letters = DeadLetters(db)
        await (letters.drop(id, "it was a test's") if drop else letters.write([letter]))
        await db.close()

    asyncio.run(change(drop=False))
    try:
        hint(cli("dlq", "show", id[:-1]), id)
        hint(cli("dlq", "list", "--kind", "cal"), "call")
        hint(cli("dlq", "list", "--state", "opn"), "open")
        hint(cli("dlq", "list", "--agent", "dischrge"), "discharge", code=0)
        hint(cli("dlq", "list", "--tool", "order_medicaton"), "order_medication", code=0)
    finally:
        asyncio.run(change(drop=True))


def test_what_is_left_to_settle() -> None:
    pending = Pending(step="medication order", role="pharmacist", what="it did not answer", key="k/3")
    result = RunResult(outcome=RunOutcome.PARTIAL, key_base="k", pending=[pending])
    with pytest.raises(Refused, match=r"did you mean 'medication order'\?$"):
        _open_end("discharge-1", "medication ordr", result, [])


def test_tools_in_a_declaration() -> None:
    world = World()
    with pytest.raises(TypeError, match=r"unknown tools \['resrve'\]; did you mean reserve\?"):
        AgentSpec(
            name="slip",
            description="x",
            instructions="x",
            input=World,  # type: ignore[arg-type]
            tools=(world.tool("reserve"),),
            steps=(StepSpec(name="room", tools=["resrve"]),),
        )


def test_ids_have_to_be_more_alike_than_words() -> None:
    assert did_you_mean("discharge-1234", ["discharge-9876"], ID) == ""
    assert did_you_mean("Discharge-A1", ["discharge-b2", "discharge-A1x"], ID) == "; did you mean discharge-A1x?"
    assert did_you_mean("x" * 1_000_000, ["x" * 200]) == ""
    assert did_you_mean("", ["a"]) == did_you_mean("a", []) == ""
