"""How a run looks at a terminal."""

from datetime import UTC, datetime

from rich.console import Console

from holdfast.cli.runs import from_result
from holdfast.cli.view import approval_view, result_view, status_view, undone_view
from holdfast.contracts.people import Approval
from holdfast.contracts.recovery import Action, ActionEnd
from holdfast.contracts.run import Pending, RunOutcome, RunResult, Stands, UndoRecord
from holdfast.contracts.tool_call import UndoStatus
from holdfast.recovery.model import amended


def test_why_an_effect_could_not_be_undone_is_shown_in_full() -> None:
    note = "the appointment has begun: call the ward and cancel it by hand, " * 3 + "then settle the effect"
    failed = UndoRecord(seq=1, tool="book_appointment", status=UndoStatus.FAILED, note=note)
    console = Console(width=80)
    with console.capture() as shown:
        console.print(undone_view([failed]))
    assert note in " ".join(shown.get().split())


def test_what_services_and_people_write_is_shown_as_it_is() -> None:
    """Brackets are markup to the terminal's library: it would swallow them, or fail on them."""
    words = {"role": "[/nurse]", "why": "[urgent] the service said [/b]", "evidence": "[red]2/3", "key": "[k]/1"}
    approval = Approval(id="o1", kind="outcome", subject="[s]", seq=1, asked_at=datetime.now(UTC), **words)  # type: ignore[arg-type]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(approval_view("[run]", approval))
    for each in (*words.values(), "[s]", "settle '[run]' o1"):
        assert each in shown.get()


def test_what_still_stands_is_named_by_result_and_status() -> None:
    left = Stands(seq=7, tool="notify_patient", why="it has no undo")
    result = RunResult(outcome=RunOutcome.CANCELLED, stands=[left])
    for view in (result_view("r", result), status_view("r", from_result(result))):
        console = Console(width=80)
        with console.capture() as shown:
            console.print(view)
        assert "still stands: notify_patient #7: it has no undo" in shown.get()


def test_a_call_that_a_person_finds_to_have_happened_stands_after_an_unwinding() -> None:
    result = RunResult(
        outcome=RunOutcome.FAILED, pending=[Pending(step="tell", role="", what="unknown", key="k/7")], key_base="k"
    )
    finding = Action(do="settle", key="k/7", seq=7, tool="tell", step="tell", happened=True)
    ends = [ActionEnd(action=finding, ok=True, words="it happened")]
    once = amended(result, ends)
    assert [str(each) for each in once.stands] == ["tell #7"]
    assert amended(once, ends) == once
    did_not = [ActionEnd(action=finding.model_copy(update={"happened": False}), ok=True, words="it did not")]
    assert amended(result, did_not).stands == []


def test_a_result_no_longer_says_pending_once_that_is_done() -> None:
    pending = [Pending(step=name, role="pharmacist", what="no answer", key=f"k/{n}") for n, name in enumerate("ab")]
    words = "Done: all. Pending: order a, order b."
    result = RunResult(outcome=RunOutcome.PARTIAL, summary=words, pending=pending, key_base="k")

    def settled(n: int, name: str) -> list[ActionEnd]:
        action = Action(do="settle", key=f"k/{n}", seq=n, tool=name, step=name, happened=True)
        return [ActionEnd(action=action, ok=True, words="settled by ph.kim: it happened")]

    first = amended(result, settled(0, "a"))
    assert (first.outcome, first.said) == (RunOutcome.PARTIAL, words)
    assert first.summary == "Since the run's end: a: settled by ph.kim: it happened"
    both = amended(first, settled(1, "b"))
    assert both.outcome is RunOutcome.COMPLETED
    assert both.summary.endswith("; b: settled by ph.kim: it happened")
    assert amended(both, settled(1, "b")) == both
    console = Console(width=80)
    with console.capture() as shown:
        console.print(result_view("r", both))
    assert "pending" not in shown.get().lower()
    did_not = settled(0, "a")
    did_not[0].action.happened = False
    assert amended(result, did_not).summary == words
