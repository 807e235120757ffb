"""`starter.py demo`: one discharge whose worker is killed twice, and a count of its requests and effects."""

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
from dataclasses import dataclass
from pathlib import Path

import httpx2
from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from holdfast.cli import runs, view
from holdfast.cli.lookup import Handle, find, link
from holdfast.cli.output import err, money, out, seconds
from holdfast.cli.settle import settle
from holdfast.cli.tally import Line, Sent, count, doubled, received, unmatched
from holdfast.cli.up import cancelled_by_signal
from holdfast.contracts import door
from holdfast.contracts.data import Json
from holdfast.contracts.people import Approval, Verdict
from holdfast.contracts.run import Phase, RunOutcome, RunResult, RunStatus, StepStatus
from holdfast.dev.simulation.hospital import EffectRow, HospitalRecord
from holdfast.dev.simulation.scripted_model import ModelRecord
from holdfast.dev.stack import Child, Stack, temporal_cli, without_ours
from holdfast.engine.client import Client, connect
from holdfast.engine.starting import start_run
from holdfast.reliability.ledger import Entry, Ledger
from holdfast.settings import settings
from holdfast.state.opening import open_database
from holdfast.state.runs import Runs

PHYSICIAN = "dr.lee"
PHARMACIST = "ph.kim"
BY_PHONE = "ordered by telephone"
PATIENT = "pat-1"
THINK_S = 0.4
"""Seconds that the scripted model takes for an answer, so that a viewer can follow."""
SLOW_S = 4.0
WITHIN_S = 15.0
"""Seconds within which a killed worker's run goes on, including the start of another worker."""
PATIENCE_S = 45.0


class Stuck(Exception):
    """The demo did not reach its next step. The message says which."""


@dataclass(frozen=True)
class Kill:
    what: str
    status: int | None
    """The worker's exit status as the system reports it."""
    resumed_s: float
    """Seconds until the hospital or the model heard from the run again."""


async def demo(*, fail: bool, yes: bool, keep: bool) -> int:
    """Runs the demo. Returns 0 when every claim held, 1 when one did not, 130 after Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-", ignore_cleanup_errors=True) as home:
        # No key, server or store of the user: the demo must not depend on this machine's settings.
        stack = Stack(Path(home), without_ours(os.environ), durable=False, think_s=THINK_S)
        os.environ.clear()
        os.environ.update(stack.environment)
        settings.cache_clear()  # settings that were read before this are those of the machine
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
            err.print(Text(str(error), "red"))
            code = 1
        finally:
            stack.stop(grace_s=0)  # its state is deleted anyway
    return code


class Demo:
    """One run of the demo. `play` has its steps, in order."""

    def __init__(self, stack: Stack, *, fail: bool, ask: bool) -> None:
        self._stack = stack
        self._fail = fail
        self._ask = ask
        self._began = time.monotonic()
        self._hospital = HospitalRecord(stack.home / "hospital.db")
        self._model = ModelRecord(stack.home / "model.db")
        self._kills: list[Kill] = []
        self._status: RunStatus | None = None
        self._watching: asyncio.Task[None] | None = None
        self._live: Live | None = None
        self._told: set[str] = set()
        """What was printed already: ids of failed requests, names of pending steps, ids of answered approvals."""

    async def play(self) -> int:
        out.print("[bold]Holdfast demo[/bold]: a patient's discharge whose workers are killed, on simulated services")
        out.print("[dim]starting Temporal, a worker, the simulated hospital, the scripted model …[/dim]")
        await self._stack.start()
        client = await connect()
        handle = await self._start(client)
        self._watching = asyncio.create_task(self._watch(client, handle))
        try:
            await self._kill_in_flight()
            await self._kill_between_turns()
            # After a rejection the agent may change the message and ask again.
            while approvals := await self._until_asked_or_ended():
                await self._decide(handle, approvals)
            await self._watching
        finally:
            self._watching.cancel()
            self._show(None)
        known = await find(client, handle.id, with_row=True)
        result = await known.result()
        if result is None:
            raise Stuck(f"{handle.id} ended without a result\n{self._logs()}")
        entries = await self._ledger(result.key_base)
        later = await self._settle(client, handle.id) if result.outcome is RunOutcome.PARTIAL else None
        return self._judge(handle.id, result, entries, later)

    # ------------------------------------------------------------ the story

    async def _start(self, client: Client) -> Handle:
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
        out.print(f"Web UI     {link(client, started.workflow_id)}")
        out.print(
            f"model      {Text('scripted, SIMULATED', 'yellow').markup}: it calls tools and writes text by rules\n"
        )
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
        """Kills the worker while the hospital has not yet answered one of its requests."""

        def in_flight() -> bool:
            requests = self._hospital.requests()
            failed = [each for each in requests if each.service == "insurance" and each.status]
            return len(failed) >= 2 and any(r.service == "appointments" and r.status is None for r in requests)

        worker = self._stack.workers[0]
        await self._until(in_flight, "a booking in flight")
        worker.signal(signal.SIGKILL)
        await self._replace(worker, "a booking in flight", HOLDFAST_FAULT="kill:turn-started@turn-4")

    async def _kill_between_turns(self) -> None:
        """The second worker kills itself with SIGKILL at the crash point between turns 3 and 4, set at its start.

        That moment lasts some milliseconds: a kill from outside would hit it only by luck.
        """
        worker = self._stack.workers[1]
        await self._until(lambda: not worker.alive, "the end of turn 3")
        await self._replace(worker, "between two turns")

    async def _replace(self, worker: Child, what: str, **environment: str) -> None:
        """Starts another worker and waits until the hospital or the model hears from the run again."""
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

    async def _until_asked_or_ended(self) -> list[Approval]:
        """The open requests to the physician; empty when the run has ended instead."""
        assert self._watching is not None
        watching = self._watching

        def asked() -> list[Approval]:
            waits = self._status is not None and self._status.phase is Phase.WAITING_HUMAN
            open_ones = self._status.approvals if waits and self._status else []
            return [a for a in open_ones if a.kind == "tool" and a.id not in self._told]

        await self._until(lambda: watching.done() or bool(asked()), "the physician to be asked")
        return [] if watching.done() else asked()

    async def _decide(self, handle: Handle, approvals: list[Approval]) -> None:
        """Gets the physician's answers to all open requests, and sends them."""
        self._show(None)
        self._told.update(approval.id for approval in approvals)
        if self._fail:
            await self._fault("messages", mode="fail", status=403, method="POST")
        self._say("?", "bold yellow", "the run stops here and asks the physician; nothing of it is held in a worker")
        if self._ask:
            for approval in approvals:
                self._show_request(handle, approval)
                out.print("\n[dim]from another terminal, the plain Temporal CLI does the same as your yes:[/dim]")
                print(f"  {shlex.join(self._signal_command(handle.id, approval.id))}", flush=True)
                await self._ask_person(handle, approval)
            return
        for approval in approvals:
            self._show_request(handle, approval)
        commands = [self._signal_command(handle.id, approval.id) for approval in approvals]
        out.print("\n[dim]without a terminal, or with --yes, the demo approves with the plain Temporal CLI:[/dim]")
        for command in commands:
            print(f"  {shlex.join(command)}", flush=True)
        await asyncio.gather(*(_run(command) for command in commands))

    def _show_request(self, handle: Handle, approval: Approval) -> None:
        out.print(Padding(view.approval_view(handle.id, approval, hint=False), (0, 0, 0, 6)))

    async def _ask_person(self, handle: Handle, approval: Approval) -> None:
        """Asks at the terminal. Also returns when the approval was answered elsewhere, such as in the Web UI."""
        question = f"\n[bold yellow]{PHYSICIAN}, {approval.subject}: send this?[/bold yellow] (y)es or (n)o: "
        verdict, comment = None, ""
        while verdict is None:
            if (answer := await self._line(question, approval)) is None:
                return
            verdict = said(answer)
        while verdict is Verdict.REJECT and not door.visible(comment):
            if (answer := await self._line("reason, which the agent reads: ", approval)) is None:
                return
            comment = answer
        decision = runs.checked_decision(approval.id, verdict, PHYSICIAN, comment, digest=approval.digest)
        sent = await runs.send(handle, decision)
        out.print(f"[dim]{sent.reply.message}[/dim]", end="\n\n")

    async def _settle(self, client: Client, run: str) -> RunResult | None:
        """Settles the order that the pharmacist placed by telephone. Returns the result after that."""
        self._say(
            "…", "yellow", "the run has ended partial; later the pharmacist places the order by telephone and says so:"
        )
        print(f"  uv run starter.py settle {run} pharmacy --happened --by {PHARMACIST} --comment '{BY_PHONE}'")
        code = await settle(run, "pharmacy", happened=True, result="", by=PHARMACIST, comment=BY_PHONE, as_json=False)
        if code != 0:
            return None
        return await (await find(client, run, with_row=True)).result()

    async def _line(self, question: str, approval: Approval) -> str | None:
        """A line typed at the terminal; None when the approval was answered elsewhere meanwhile.

        Not `input()` in a thread: a thread that waits for a key would delay the exit after Ctrl-C.
        """
        out.print(question, end="")
        loop = asyncio.get_running_loop()
        typed: asyncio.Future[str] = loop.create_future()
        loop.add_reader(sys.stdin, lambda: typed.done() or typed.set_result(sys.stdin.readline()))
        try:
            while not typed.done():
                await asyncio.wait((typed,), timeout=0.2)
                if self._status is not None and all(each.id != approval.id for each in self._status.approvals):
                    out.print("\n[dim]answered elsewhere[/dim]")
                    return None
        finally:
            loop.remove_reader(sys.stdin)
        if not typed.result():
            raise Stuck("the terminal was closed before there was an answer")
        return typed.result().strip()

    def _signal_command(self, workflow_id: str, approval_id: str) -> list[str]:
        decision = json.dumps({"approval_id": approval_id, "verdict": "approve", "approver": PHYSICIAN})
        where = ["--address", self._stack.temporal_address, "--workflow-id", workflow_id]
        return ["temporal", "workflow", "signal", *where, "--name", "decide", "--input", decision]

    # ------------------------------------------------------------ watching

    async def _watch(self, client: Client, handle: Handle) -> None:
        """Keeps the display of the run up to date until it ends."""
        self._show(Text(""))
        async for status in runs.changes(client, handle, every_s=0.2):
            if isinstance(status, str):
                continue  # no worker at the moment: expected here
            told = self._status and view.plain_line(self._status)
            self._status = status
            for step in status.steps:
                if step.status is StepStatus.PENDING:
                    words = f"{step.title} is pending {step.role} review; the run goes on without it"
                    self._say_once(step.name, "…", "yellow", words)
            asked = status.phase is Phase.WAITING_HUMAN
            if out.is_terminal and not asked:
                picture = view.status_view(handle.id, status, ask=False)
                self._show(Group("", Padding(picture, (0, 0, 0, 6))))
            elif not out.is_terminal and told != view.plain_line(status):
                self._say("·", "dim", view.plain_line(status).strip())

    def _show(self, picture: RenderableType | None) -> None:
        """Shows the live display below the printed lines, at a terminal; None removes it."""
        if picture is None and self._live is not None:
            self._live.stop()
            self._live = None
        if picture is not None and self._live is None:
            self._live = Live(console=out, auto_refresh=False, transient=True)
            self._live.start()
        if picture is not None and self._live is not None:
            self._live.update(picture, refresh=True)

    def _say_once(self, name: str, mark: str, style: str, text: str) -> None:
        if name not in self._told:
            self._told.add(name)
            self._say(mark, style, text)

    def _tell_failures(self) -> None:
        for each in self._hospital.requests():
            # A 404 is no failure: there was nothing to undo.
            if each.status is not None and each.status >= 400 and each.status != 404:
                self._say_once(f"request {each.id}", "!", "yellow", f"{each.service} answers {each.status}")

    def _say(self, mark: str, style: str, text: str) -> None:
        out.print(Text.assemble((f"{time.monotonic() - self._began:5.1f} s  ", "dim"), (mark, style), f"  {text}"))

    def _sent(self) -> list[Sent]:
        return received(self._hospital.requests(), self._model.calls())

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits until a condition on other processes holds. Raises Stuck."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            self._tell_failures()
            if self._watching is not None and self._watching.done():
                raise Stuck(f"the run ended before {what}\n{self._logs()}")
            if time.monotonic() > deadline:
                raise Stuck(f"waited {PATIENCE_S:.0f} s for {what}\n{self._logs()}")
            await asyncio.sleep(0.02)
        self._tell_failures()

    def _logs(self) -> str:
        return "\n".join(child.complaint("says") for child in self._stack.children)

    # ------------------------------------------------------------ the end

    async def _ledger(self, key_base: str) -> list[Entry]:
        store = await open_database(self._stack.store_url)
        try:
            return await Ledger(store, "demo").entries(key_base)
        finally:
            await store.close()

    def _judge(self, workflow_id: str, result: RunResult, entries: list[Entry], later: RunResult | None) -> int:
        """Prints the counts and which claims held. Returns 0 when all of them did.

        result, entries: at the run's end. later: the result after the pharmacist settled the order.
        """
        effects = self._hospital.effects()
        lines = count(self._sent(), effects, entries)
        claims = list(self._claims(result, lines, effects, entries))
        if result.outcome is RunOutcome.PARTIAL:
            held = later is not None and later.outcome is RunOutcome.COMPLETED and not later.pending
            claims.append(("the pharmacist settled the order after the run's end, and the result is completed", held))
        out.print()
        out.print(view.result_view(workflow_id, later or result))
        out.print()
        out.print(counted(lines))
        out.print(
            f"\ntook {seconds(time.monotonic() - self._began)}, {seconds(result.human_wait_s)} of it for the human"
        )
        out.print(f"tokens {result.usage.input_tokens + result.usage.output_tokens:,}, cost ", end="")
        out.print(
            f"{money(result.usage.cost_usd, result.usage.unpriced)} (the model is simulated, and so are its tokens)"
        )
        pending = "; ".join(f"{p.step}, for {p.role} review" for p in result.pending)
        out.print(f"pending at the run's end: {pending or 'nothing'}\n")
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
        self, result: RunResult, lines: list[Line], effects: list[EffectRow], entries: list[Entry]
    ) -> Iterable[tuple[str, bool]]:
        by_service = {line.service: line for line in lines}
        slowest = max(kill.resumed_s for kill in self._kills)
        killed = len(self._kills) == 2 and all(kill.status == -signal.SIGKILL for kill in self._kills)
        held = killed and slowest <= WITHIN_S
        yield f"two workers were killed with SIGKILL, and the run went on within {slowest:.1f} s", held
        yield "no recorded call was repeated, of a tool or of the model", not any(line.recorded for line in lines)
        yield "nothing was done twice: one effect a key in the hospital's record", not doubled(effects)
        yield "the ledger and the hospital's record agree on what was done", not unmatched(effects, entries)
        answers = by_service["insurance"].answers
        yield "insurance failed twice and recovered", answers["503"] == 2 and answers["200"] >= 1
        yield from self._claims_of_messages(result, effects)
        last_words = {each.approval.subject: each.decision.verdict for each in result.decisions}
        rejected = Verdict.REJECT in last_words.values()
        if self._fail or rejected:
            outcome = RunOutcome.REJECTED if rejected else RunOutcome.FAILED
            yield from self._claims_of_undoing(effects)
        else:
            outcome = RunOutcome.PARTIAL
            held = not by_service["pharmacy"].effects and any(each.step == "pharmacy" for each in result.pending)
            yield "the pharmacy hung; its order is left pending for the pharmacist", held
        yield f"the run ended as it should: {outcome}", result.outcome is outcome

    def _claims_of_messages(self, result: RunResult, effects: list[EffectRow]) -> Iterable[tuple[str, bool]]:
        """Each approval is followed by one message, and there is no other; with --fail no message can be sent."""
        sent = sorted(effect.at for effect in effects if effect.kind == "message")
        said = [each for each in result.decisions if each.decision.verdict is Verdict.APPROVE]
        yes = sorted(each.decided_at.timestamp() for each in said)
        if self._fail or not yes:
            yield "no message was sent", not sent
        else:
            held = len(sent) == len(yes) and all(at > when for at, when in zip(sent, yes, strict=True))
            were = "1 message was" if len(sent) == 1 else f"{len(sent)} messages were"
            yield f"{were} sent, each after the physician's yes to it", held

    def _claims_of_undoing(self, effects: list[EffectRow]) -> Iterable[tuple[str, bool]]:
        opposite = {"book": "cancel-booking", "order": "cancel-order"}
        done = [effect.kind for effect in effects if effect.kind in opposite]
        undone = [effect.kind for effect in effects if effect.kind in opposite.values()]
        wanted = ["book", "order"] if self._fail else ["book"]
        held = sorted(done) == wanted and sorted(undone) == [opposite[kind] for kind in wanted]
        yield f"what was done is undone: {', '.join(undone)}", held
        if self._fail:  # the order was decided before the booking
            yield "it is undone in reverse order", undone == ["cancel-booking", "cancel-order"]


def said(answer: str) -> Verdict | None:
    """The verdict that a typed yes or no means; None when it is not clear."""
    words = {"yes": Verdict.APPROVE, "approve": Verdict.APPROVE, "no": Verdict.REJECT, "reject": Verdict.REJECT}
    return next((verdict for word, verdict in words.items() if answer and word.startswith(answer.lower())), None)


def counted(lines: list[Line]) -> Table:
    """The table of counts from the records of the hospital, the model and the ledger."""
    table = Table(
        title="counted from the hospital's and the model's own records, and the ledger",
        title_style="bold",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        show_footer=True,
        footer_style="bold",
    )

    def number(heading: str, values: list[int]) -> None:
        table.add_column(heading, str(sum(values)), justify="right", no_wrap=True)

    table.add_column("service", "in all", no_wrap=True)
    number("requests", [line.requests for line in lines])
    table.add_column("effects", no_wrap=True)
    number("retries", [line.retries for line in lines])
    number("again after\na kill", [line.repeated for line in lines])
    number("again though\nrecorded", [line.recorded for line in lines])
    table.add_column("answers", no_wrap=True)
    for line in lines:
        effects = "\n".join(f"{times} {kind}" for kind, times in line.effects.items())
        answers = ", ".join(f"{times} × {status}" for status, times in line.answers.items())
        numbers = (str(n) for n in (line.retries, line.repeated, line.recorded))
        table.add_row(line.service, str(line.requests), effects or "–", *numbers, answers)
    return table


async def _run(command: list[str]) -> None:
    """Runs the Temporal CLI. Raises Stuck with its output when it fails."""
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
