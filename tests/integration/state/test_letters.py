"""Dead letters: one row a thing, kept until somebody closes it, in the hands of one workflow at a time."""

import asyncio

import pytest

from holdfast.recovery.dead_letters import DeadLetter, DeadLetters, LetterKind, LetterState, dump, letter_id
from holdfast.state.database import Database


@pytest.fixture
def letters(db: Database) -> DeadLetters:
    return DeadLetters(db)


def letter(kind: LetterKind = LetterKind.CALL, key: str = "wf/base/1", **more: str) -> DeadLetter:
    made = DeadLetter(
        id=letter_id(kind, key),
        kind=kind,
        state=LetterState.OPEN,
        agent="discharge",
        tenant="default",
        workflow_id="wf",
        key_base="wf/base",
        key=key,
        subject="order",
        role="pharmacist",
        cause="closed",
        context=dump({"arguments": {"n": "é"}}),
    )
    return made._replace(**more)


async def test_written_twice_it_is_one_letter_with_the_latest_cause(letters: DeadLetters) -> None:
    await letters.write([letter(), letter(key="wf/base/2")])
    first = await letters.find()
    await letters.write([letter(cause="still closed")])
    found = await letters.find()
    assert [each.cause for each in found] == ["still closed", "closed"]
    assert [each.created_at for each in found] == [each.created_at for each in first]
    assert found[0].details == {"arguments": {"n": "é"}}


async def test_a_closed_letter_is_not_opened_by_the_same_write(letters: DeadLetters) -> None:
    await letters.write([letter()])
    assert await letters.close(letter().id, LetterState.SETTLED, "by dr.lee")
    await letters.write([letter(cause="late")])
    found = await letters.get(letter().id)
    assert found is not None
    assert (found.state, found.cause, found.note, found.closed_at is not None) == (
        "settled",
        "closed",
        "by dr.lee",
        True,
    )
    assert not await letters.close(letter().id, LetterState.REPLAYED, "again")
    assert not await letters.drop(letter().id, "again")


async def test_a_late_write_of_the_first_run_does_not_take_a_letter_back(letters: DeadLetters) -> None:
    run = letter(LetterKind.RUN, "wf/base")
    await letters.write([run])
    assert await letters.hand_over(run, "wf~1", {"replays": 1}, "replayed by dr.lee")
    await letters.write([run])
    found = await letters.get(run.id)
    assert found is not None
    assert (found.state, found.workflow_id) == ("replaying", "wf~1")
    await letters.write([run._replace(workflow_id="wf~1", key_base="wf~1/base", cause="again")])
    found = await letters.get(run.id)
    assert found is not None
    assert (found.state, found.key_base, found.cause) == ("open", "wf~1/base", "again")


async def test_only_one_of_many_takes_a_letter(letters: DeadLetters) -> None:
    run = letter(LetterKind.RUN, "wf/base")
    await letters.write([run])
    taken = await asyncio.gather(*(letters.hand_over(run, f"wf~{n}", {}, "") for n in range(8)))
    assert taken.count(True) == 1


async def test_what_is_being_replayed_cannot_be_dropped(letters: DeadLetters) -> None:
    await letters.write([letter()])
    assert await letters.claim(letter().id, "wf", "replayed by dr.lee")
    assert not await letters.drop(letter().id, "no use")
    assert not await letters.claim(letter().id, "another run", "")
    await letters.reopen(letter().id, "closed again", "")
    assert await letters.drop(letter().id, "no use")


async def test_a_filter_finds_what_fits(letters: DeadLetters) -> None:
    undo = letter(LetterKind.UNDO, "wf/base/1/undo", subject="book")
    await letters.write([letter(), undo, letter(key="x/1", agent="billing", workflow_id="x")])
    await letters.drop(undo.id, "done by phone")
    assert len(await letters.find()) == 3
    assert [each.id for each in await letters.find(tool="book")] == [undo.id]
    assert [each.id for each in await letters.find(agent="discharge", kind="call")] == [letter().id]
    assert [each.id for each in await letters.find(state="dropped")] == [undo.id]
    assert [each.id for each in await letters.of_workflow("wf")] == [letter().id]
