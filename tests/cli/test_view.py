"""How a run looks at a terminal."""

from rich.console import Console

from holdfast.cli.view import undone_view
from holdfast.contracts import UndoRecord, UndoStatus


def test_why_an_effect_could_not_be_undone_is_shown_in_full() -> None:
    note = "the appointment has begun: call the ward and cancel it by hand, " * 3 + "then settle the effect"
    failed = UndoRecord(seq=1, tool="book_appointment", status=UndoStatus.FAILED, note=note)
    console = Console(width=80)
    with console.capture() as shown:
        console.print(undone_view([failed]))
    assert note in " ".join(shown.get().split())
