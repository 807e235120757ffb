"""How a run looks at a terminal."""

from datetime import UTC, datetime

from rich.console import Console

from holdfast.cli.view import approval_view, undone_view
from holdfast.contracts import Approval, UndoRecord, UndoStatus


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
    for each in (*words.values(), "[s]", "settle [run] o1"):
        assert each in shown.get()
