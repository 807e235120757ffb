"""`starter.py demo`: one discharge that is killed twice and finishes, and what can be counted of it afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
from rich.console import Group
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from holdfast.cli import runs, view
from holdfast.cli.output import err, money, out, seconds
from holdfast.cli.tally import Line, Sent, count, doubled, received, unmatched
from holdfast.cli.up import cancelled_by_signal
from holdfast.contracts import Approval, ApprovalDecision, Json, Phase, RunOutcome, RunResult, RunStatus, Verdict
from holdfast.reliability.ledger import Entry, Ledger
from holdfast.simulation.hospital import EffectRow, HospitalRecord
from holdfast.simulation.scripted_model import ModelRecord
from holdfast.stack import Child, Stack, temporal_cli, without_ours
from holdfast.starting import start_run
from holdfast.state.database import open_database
from holdfast.state.runs import Runs
from holdfast.temporal import Client, connect

PHYSICIAN = "dr.lee"
PATIENT = "pat-1"
THINK_S = 0.4
"""Seconds that the scripted model takes for an answer, so that one can see it think."""
SLOW_S = 4.0
WITHIN_S = 10.0
"""A killed worker's run goes on within so many seconds, the start of another worker included."""
PATIENCE_S = 45.0


class Stuck(Exception):
    """The story did not get to its next point. The message says which."""


@dataclass(frozen=True)
class Kill:
    what: str
    status: int | None
    """The worker's exit status as the system reports it."""
    resumed_s: float
    """Seconds until the hospital or the model heard from the run again."""


async def demo(*, fail: bool, yes: bool, keep: bool) -> int:
    """Shows it. 0 when every claim held, 1 when one did not, 130 after Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-", ignore_cleanup_errors=True) as home:
        # Nobody's key, server or store: what the demo shows must not depend on this machine's settings.
        stack = Stack(Path(home), without_ours(os.environ), durable=False, think_s=THINK_S)
        os.environ.clear()
        os.environ.update(stack.environment)
        code = 130
        try:
            with cancelled_by_signal():
                code = await Demo(stack, fail=fail, ask=not yes and sys.stdin.isatty() and out.is_terminal).play()
                if keep:
                    stack.publish()
                    out.print(f"\nthe stack stays up until Ctrl-C: Web UI {stack.ui_url}, and from another terminal")
                    out.print(f"  HOLDFAST_HOME={stack.home} uv run starter.py list", markup=False)
                    await asyncio.Event().wait()
        except asyncio.CancelledError:
            err.print("\n[dim]stopped[/dim]")
        except Stuck as error:
            err.print(f"[red]{error}[/red]", soft_wrap=True)
            code = 1
        finally:
            stack.stop(grace_s=0)  # nothing of it is kept
    return code


class Demo:
    """One showing. The steps of the story are in `play`, in their order."""

    def __init__(self, stack: Stack, *, fail: bool, ask: bool) -> None:
        self._stack = stack
        self._fail = fail
        self._ask = ask
        self._began = time.monotonic()
        self._hospital = HospitalRecord(stack.home / "hospital.db")
        self._model = ModelRecord(stack.home / "model.db")
        self._kills: list[Kill] = []
        self._status: RunStatus | None = None
        self._live = Live(console=out, auto_refresh=False, transient=True)

    async def play(self) -> int:
        out.print("[bold]Holdfast demo[/bold]: a patient's discharge whose workers are killed, on simulated services")
        out.print("[dim]starting Temporal, a worker, the simulated hospital, the scripted model …[/dim]")
        await self._stack.start()
        client = await connect()
        handle = await self._start(client)
        watching = asyncio.create_task(self._watch(handle))
        try:
            await self._kill_in_flight()
            await self._kill_between_turns()
            approvals = await self._until_asked()
            verdict = await self._decide(handle, approvals)
            await asyncio.wait_for(watching, PATIENCE_S)
        except TimeoutError:
            raise Stuck(f"the run did not end within {PATIENCE_S:.0f} s\n{self._logs()}") from None
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            self._live.stop()
        known = await runs.find(client, handle.id, with_row=True)
        result = await known.result()
        if result is None:
            raise Stuck(f"{handle.id} ended without a result\n{self._logs()}")
        return await self._judge(handle.id, result, verdict)

    # ------------------------------------------------------------ the story

    async def _start(self, client: Client) -> runs.Handle:
        await self._order_faults()
        store = await open_database(self._stack.store_url)
        try:
            value: Json = {"patient_id": PATIENT, "physician": PHYSICIAN}
            started = await start_run(
                client, Runs(store), "discharge", value, task_queue="holdfast", requested_by="demo"
            )
        finally:
            await store.close()
        out.print(f"run        [bold]{started.workflow_id}[/bold]")
        out.print(f"Web UI     {runs.link(client, started.workflow_id)}")
        out.print(
            f"model      {Text('scripted, SIMULATED', 'yellow').markup}: it calls tools and writes text by rules\n"
        )
        self._live.start()
        return client.get_workflow_handle(started.workflow_id, result_type=RunResult)

    async def _order_faults(self) -> None:
        await self._fault("insurance", mode="fail", times=2, status=503)
        await self._fault("appointments", mode="slow", seconds=SLOW_S, times=1)
        if not self._fail:  # with --fail the order goes through, so that there is one to undo
            await self._fault("pharmacy", mode="hang", method="POST")

    async def _fault(self, service: str, **fault: str | float) -> None:
        async with httpx2.AsyncClient() as http:
            answer = await http.put(f"{self._stack.hospital_url}/faults/{service}", json=fault)
            answer.raise_for_status()

    async def _kill_in_flight(self) -> None:
        """Kills the worker from outside, while the hospital has a request of it that it has not answered yet."""

        def in_flight() -> bool:
            requests = self._hospital.requests()
            failed = [each for each in requests if each.service == "insurance" and each.status]
            return len(failed) >= 2 and any(r.service == "appointments" and r.status is None for r in requests)

        worker = self._stack.workers[0]
        await self._until(in_flight, "a booking in flight")
        worker.signal(signal.SIGKILL)
        await self._replace(worker, "a booking in flight", HOLDFAST_FAULT="kill:turn-started@turn-4")

    async def _kill_between_turns(self) -> None:
        """The second worker kills itself with SIGKILL, armed at its start with the crash point between turns 3 and 4.

        From outside that moment, some milliseconds, could only be hit by luck.
        """
        worker = self._stack.workers[1]
        await self._until(lambda: not worker.alive, "the end of turn 3")
        await self._replace(worker, "between two turns")

    async def _replace(self, worker: Child, what: str, **environment: str) -> None:
        """Starts another worker and waits until the run goes on, as the hospital and the model see it."""
        killed = time.time()
        self._say("✗", "red", f"{worker.name} (process {worker.pid}) is killed with SIGKILL, {what}")
        worker.wait(5)
        await self._stack.start_worker(**environment)
        polling = time.time() - killed
        await self._until(lambda: any(each.at > killed for each in self._sent()), "the run to go on")
        resumed = min(each.at for each in self._sent() if each.at > killed) - killed
        self._kills.append(Kill(what, worker.exit_code, resumed))
        started = f"another worker polls after {polling:.1f} s"
        self._say("✓", "green", f"the run goes on {resumed:.1f} s after the kill ({started})")

    async def _until_asked(self) -> list[Approval]:
        def asked() -> bool:
            return self._status is not None and self._status.phase is Phase.WAITING_HUMAN

        await self._until(asked, "the physician to be asked")
        assert self._status is not None
        return self._status.approvals

    async def _decide(self, handle: runs.Handle, approvals: list[Approval]) -> Verdict:
        """Gets the physician's answer to all that is asked and sends it; what it was."""
        self._live.stop()
        if self._fail:
            await self._fault("messages", mode="fail", status=403, method="POST")
        self._say("?", "bold yellow", "the run stops here and asks the physician; nothing of it is held in a worker")
        for approval in approvals:
            out.print(Padding(view.approval_view(handle.id, approval, hint=False), (0, 0, 0, 6)))
        commands = [self._signal_command(handle.id, approval.id) for approval in approvals]
        if not self._ask:
            out.print("\n[dim]no one is asked, so the demo approves with the plain Temporal CLI:[/dim]")
            for command in commands:
                print(f"  {shlex.join(command)}", flush=True)
                await _run(command)
            verdict = Verdict.APPROVE
        else:
            out.print("\n[dim]from another terminal, the plain Temporal CLI does the same as your yes:[/dim]")
            for command in commands:
                print(f"  {shlex.join(command)}", flush=True)
            verdict = await self._ask_person(handle, approvals)
        self._live.start()
        return verdict

    async def _ask_person(self, handle: runs.Handle, approvals: list[Approval]) -> Verdict:
        question = f"\n[bold yellow]{PHYSICIAN}, send {len(approvals)} messages?[/bold yellow] (a)pprove or (r)eject: "
        verdict, comment = None, ""
        while verdict is None:
            answer = await self._line(question)
            if answer is None:  # answered elsewhere, in the Web UI say
                return await self._verdict_from_elsewhere(handle)
            word = answer.strip().lower()
            verdict = {"a": Verdict.APPROVE, "r": Verdict.REJECT}.get(word[:1]) if word else None
        while verdict is Verdict.REJECT and not comment:
            answer = await self._line("reason, which the agent reads: ")
            if answer is None:
                return await self._verdict_from_elsewhere(handle)
            comment = answer.strip()
        for approval in approvals:
            decision = ApprovalDecision(
                approval_id=approval.id, verdict=verdict, approver=PHYSICIAN, comment=comment, digest=approval.digest
            )
            reply, _ = await runs.send(handle, decision)
            out.print(f"[dim]{reply.message}[/dim]")
        return verdict

    async def _line(self, question: str) -> str | None:
        """A line typed at the terminal; None when the run stopped waiting meanwhile.

        Not `input()` in a thread: a thread that waits for a key would hold up the end after Ctrl-C.
        """
        out.print(question, end="")
        loop = asyncio.get_running_loop()
        typed: asyncio.Future[str] = loop.create_future()
        loop.add_reader(sys.stdin, lambda: typed.done() or typed.set_result(sys.stdin.readline()))
        try:
            while not typed.done():
                await asyncio.wait((typed,), timeout=0.2)
                if self._status is not None and self._status.phase is not Phase.WAITING_HUMAN:
                    return None
        finally:
            loop.remove_reader(sys.stdin)
        if not typed.result():  # end of input
            raise Stuck("the terminal was closed before there was an answer")
        return typed.result()

    async def _verdict_from_elsewhere(self, handle: runs.Handle) -> Verdict:
        out.print("\n[dim]answered from elsewhere[/dim]")
        result = await asyncio.wait_for(runs.temporal_result(handle), PATIENCE_S)
        decided = result.decisions if result is not None else []
        rejected = any(each.decision.verdict is Verdict.REJECT for each in decided)
        return Verdict.REJECT if rejected else Verdict.APPROVE

    def _signal_command(self, workflow_id: str, approval_id: str) -> list[str]:
        decision = json.dumps({"approval_id": approval_id, "verdict": "approve", "approver": PHYSICIAN})
        where = ["--address", self._stack.temporal_address, "--workflow-id", workflow_id]
        return ["temporal", "workflow", "signal", *where, "--name", "decide", "--input", decision]

    # ------------------------------------------------------------ watching

    async def _watch(self, handle: runs.Handle) -> None:
        """Keeps the picture of the run up to date until it ends."""
        async for status in runs.changes(handle, every_s=0.2):
            if isinstance(status, str):
                continue  # no worker, for the moment: that is what the demo is about
            told = self._status and view.plain_line(self._status)
            self._status = status
            if out.is_terminal:
                picture = view.status_view(handle.id, status, ask=False)
                self._live.update(Group("", Padding(picture, (0, 0, 0, 6))), refresh=True)
            elif told != view.plain_line(status):
                self._say("·", "dim", view.plain_line(status).strip())

    def _say(self, mark: str, style: str, text: str) -> None:
        out.print(Text.assemble((f"{time.monotonic() - self._began:5.1f} s  ", "dim"), (mark, style), f"  {text}"))

    def _sent(self) -> list[Sent]:
        return received(self._hospital.requests(), self._model.calls())

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for something that other processes do. Raises Stuck."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise Stuck(f"waited {PATIENCE_S:.0f} s for {what}\n{self._logs()}")
            await asyncio.sleep(0.02)

    def _logs(self) -> str:
        return "\n".join(child.complaint("says") for child in self._stack.children)

    # ------------------------------------------------------------ the end

    async def _judge(self, workflow_id: str, result: RunResult, verdict: Verdict) -> int:
        """Shows what was counted and which claims held; 0 when all of them did."""
        store = await open_database(self._stack.store_url)
        try:
            entries = await Ledger(store, "demo").entries(result.key_base)
        finally:
            await store.close()
        effects = self._hospital.effects()
        lines = count(self._sent(), effects, entries)
        claims = list(self._claims(result, verdict, lines, effects, entries))
        out.print()
        out.print(view.result_view(workflow_id, result))
        out.print()
        out.print(counted(lines))
        out.print(
            f"\ntook {seconds(time.monotonic() - self._began)}, {seconds(result.human_wait_s)} of it for the human"
        )
        out.print(f"tokens {result.usage.input_tokens + result.usage.output_tokens:,}, cost ", end="")
        out.print(
            f"{money(result.usage.cost_usd, result.usage.unpriced)} (the model is simulated, and so are its tokens)"
        )
        pending = "; ".join(f"{p.step}, for the {p.role}" for p in result.pending)
        out.print(f"pending: {pending or 'nothing'}\n")
        for claim, held in claims:
            out.print(Text("  ✓  " if held else "  ✗  ", "green" if held else "bold red") + Text(claim))
        broken = sum(not held for _, held in claims)
        if broken:
            out.print(f"\n[bold red]{broken} of {len(claims)} claims did not hold[/bold red]")
        else:
            expected = " (failing was the point)" if self._fail else ""
            out.print(f"\n[bold green]all {len(claims)} claims held[/bold green]{expected}")
        return 1 if broken else 0

    def _claims(
        self, result: RunResult, verdict: Verdict, lines: list[Line], effects: list[EffectRow], entries: list[Entry]
    ) -> Iterable[tuple[str, bool]]:
        by_service = {line.service: line for line in lines}
        slowest = max((kill.resumed_s for kill in self._kills), default=0.0)
        killed = len(self._kills) == 2 and all(kill.status == -signal.SIGKILL for kill in self._kills)
        yield (
            f"two workers were killed with SIGKILL, and the run went on within {slowest:.1f} s",
            (killed and slowest <= WITHIN_S),
        )
        yield "no recorded call was repeated, of a tool or of the model", not any(line.recorded for line in lines)
        yield "nothing was done twice: one effect a key in the hospital's record", not doubled(effects)
        yield "the ledger and the hospital's record agree on what was done", not unmatched(effects, entries)
        answers = by_service["insurance"].answers
        yield "insurance failed twice and recovered", answers["503"] == 2 and answers["200"] >= 1
        if not self._fail:
            held = not by_service["pharmacy"].effects and any(p.step == "pharmacy" for p in result.pending)
            if verdict is Verdict.APPROVE:
                yield "the pharmacy hung; its order is left pending for the pharmacist", held
        if verdict is Verdict.APPROVE and not self._fail:
            yield from self._claims_of_sending(result, effects)
        else:
            yield from self._claims_of_undoing(result, verdict, effects)

    def _claims_of_sending(self, result: RunResult, effects: list[EffectRow]) -> Iterable[tuple[str, bool]]:
        sent = [effect for effect in effects if effect.service == "messages"]
        yes = [each.decided_at.timestamp() for each in result.decisions if each.decision.verdict is Verdict.APPROVE]
        after = len(yes) == 2 and all(effect.at > min(yes) for effect in sent)
        yield "patient and providers got one message each, after the physician's yes", len(sent) == 2 and after
        yield "the run ended with a partial result", result.outcome is RunOutcome.PARTIAL

    def _claims_of_undoing(
        self, result: RunResult, verdict: Verdict, effects: list[EffectRow]
    ) -> Iterable[tuple[str, bool]]:
        """What holds when the run fails after the approval (`--fail`), or the physician says no."""
        rejected = verdict is Verdict.REJECT
        yield "no message was sent", not any(effect.kind == "message" for effect in effects)
        undo = {"book": "cancel-booking", "order": "cancel-order"}
        done = [effect.kind for effect in effects if effect.kind in undo]
        undone = [effect.kind for effect in effects if effect.kind in undo.values()]
        wanted = ["book"] if not self._fail else ["book", "order"]
        yield (
            f"what was done before is undone: {', '.join(undone)}",
            sorted(done) == wanted and sorted(undone) == sorted(undo[kind] for kind in done),
        )
        backwards = sorted((entry.seq for entry in result.undone), reverse=True)
        yield (
            "in reverse order",
            [entry.seq for entry in result.undone] == backwards
            or undone
            == [
                "cancel-booking",
                "cancel-order",
            ],
        )
        outcome = RunOutcome.REJECTED if rejected else RunOutcome.FAILED
        yield f"the run ended as {outcome}", result.outcome is outcome


def counted(lines: list[Line]) -> Table:
    """The table of what the hospital, the model and the ledger have on record."""
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_footer=True, footer_style="bold"
    )
    table.add_column("counted from their own records", "in all")
    for name, number in (
        ("requests\nreceived", sum(line.requests for line in lines)),
        ("effects\ndone", None),
        ("retries after\na failure", sum(line.retries for line in lines)),
        ("repeated, killed\nunrecorded", sum(line.repeated for line in lines)),
        ("repeated though\nrecorded", sum(line.recorded for line in lines)),
    ):
        table.add_column(name, "" if number is None else str(number), justify="left" if number is None else "right")
    table.add_column("answers", "")
    for line in lines:
        effects = ", ".join(f"{number} {kind}" for kind, number in line.effects.items())
        answers = ", ".join(
            f"{number} × {'none' if status == 'none' else status}" for status, number in line.answers.items()
        )
        cells = (str(line.requests), effects or "–", *(str(n) for n in (line.retries, line.repeated, line.recorded)))
        table.add_row(line.service, *cells, answers)
    return table


async def _run(command: list[str]) -> None:
    """Runs the Temporal CLI. Raises Stuck with its words when it fails."""
    process = await asyncio.create_subprocess_exec(
        temporal_cli(), *command[1:], stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        raise Stuck(f"{shlex.join(command)}: {said.decode(errors='replace')}")
