"""What the scripted model decides, from messages and tools alone."""

from __future__ import annotations

import json

import pytest

from agents.discharge.prompts import SUMMARY_INSTRUCTIONS
from agents.discharge.script import amendable, mend
from holdfast.dev.simulation.script import LABEL, decide
from tests.unit.simulation.conversations import Conversation, bundle

UNKNOWN = "outcome unknown: no answer within 10 s. It may have happened. It is left pending for a person."
FAILED = "failed for good after 6 failures: POST http://h/x answered 503"
IN_ORDER = [
    {"read_record", "read_orders"},
    {"verify_insurance", "order_medication", "book_appointment"},
    {"write_summary"},
    {"notify_patient", "notify_providers"},
]


@pytest.mark.parametrize("patient", ["pat-1", "pat-2", "pat-3"])
def test_a_discharge_goes_in_four_turns_of_parallel_calls(patient):
    talk = Conversation(patient)
    final = talk.play()
    assert talk.turns == IN_ORDER
    assert final.startswith(LABEL)
    assert patient in final
    for tool in ("notify_patient", "notify_providers"):
        assert talk.of(tool)[0]["text"].startswith(LABEL)


def test_arguments_come_from_the_record():
    talk = Conversation("pat-1")
    talk.play()
    assert talk.of("order_medication")[0]["items"][0] == {
        "name": "Amoxicillin 500 mg capsule",
        "dosage": "1 capsule three times a day for 5 days",
    }
    visit = talk.of("book_appointment")[0]
    assert (visit["not_before"], visit["not_after"]) == ("2026-11-28", "2026-12-05")
    assert (talk.of("notify_patient")[0]["channel"], talk.of("notify_patient")[0]["to"]) == ("phone", "+1-555-0101")
    assert talk.of("notify_providers")[0]["recipients"] == ["dr.lee", "Dr. Mira Invented"]
    assert "All is well." in talk.of("notify_providers")[0]["text"]


@pytest.mark.parametrize("answer", [UNKNOWN, FAILED, "gave up: no answer"])
def test_a_pharmacy_without_an_answer_is_left_to_the_pharmacist_and_said_everywhere(answer):
    talk = Conversation(order_medication=answer)
    final = talk.play()
    assert talk.turns == IN_ORDER
    assert any("pharmacist" in point for point in talk.of("write_summary")[0]["open_points"])
    assert "being arranged by the pharmacist" in talk.of("notify_patient")[0]["text"]
    assert "pharmacist" in talk.of("notify_providers")[0]["text"]
    assert "pharmacist" in final.partition("Pending:")[2]
    assert "medication ordered" not in final


def test_an_open_point_that_the_summary_names_is_not_said_twice():
    point = "medication order not confirmed: pending pharmacist"
    talk = Conversation(order_medication=FAILED, write_summary={"text": f"Ada. Open points: {point}."})
    talk.play()
    assert talk.of("notify_providers")[0]["text"].count(point) == 1


def test_insurance_and_appointments_without_an_answer_are_said_as_well():
    talk = Conversation(verify_insurance=FAILED, book_appointment=UNKNOWN)
    final = talk.play()
    assert "billing" in final
    assert "scheduling desk" in final
    assert "not booked yet" in talk.of("notify_patient")[0]["text"]


def test_a_tool_that_is_withdrawn_is_done_without():
    talk = Conversation(offered={t for turn in IN_ORDER for t in turn} - {"order_medication"})
    final = talk.play()
    assert talk.turns[1] == {"verify_insurance", "book_appointment"}
    assert "pharmacist" in final


def test_missing_fields_change_the_channel_and_the_open_points():
    talk = Conversation("pat-3", verify_insurance={"coverage": "none", "detail": "no coverage on file"})
    final = talk.play()
    assert talk.turns == IN_ORDER
    assert (talk.of("notify_patient")[0]["channel"], talk.of("notify_patient")[0]["to"]) == (
        "letter",
        "3 Nowhere Lane, 00003 Testbury",
    )
    assert "no coverage on file" in final
    assert talk.of("notify_providers")[0]["recipients"] == ["dr.lee"]


def test_a_patient_never_seen_before():
    """All that is said comes from the record; without an address the providers pass the message on."""
    patient = {"resourceType": "Patient", "id": "zz-42", "name": [{"text": "Quux Novel"}]}
    drug = {
        "resourceType": "MedicationRequest",
        "status": "active",
        "medicationCodeableConcept": {"text": "Unobtainium"},
    }
    stopped = drug | {"status": "stopped", "medicationCodeableConcept": {"text": "Phlogiston"}}
    talk = Conversation("zz-42", read_record=bundle(patient), read_orders=bundle(drug, stopped))
    final = talk.play()
    assert talk.turns[1] == {"verify_insurance", "order_medication"}
    assert talk.of("order_medication")[0]["items"] == [{"name": "Unobtainium"}]
    assert (talk.of("notify_patient")[0]["channel"], talk.of("notify_patient")[0]["to"]) == ("providers", "dr.lee")
    assert "Quux Novel" in final


def test_an_unknown_patient_ends_it_with_the_reason():
    error = "error: the hospital knows no patient 'nobody'; check the patient id"
    talk = Conversation("nobody", read_record=error, read_orders=error)
    final = talk.play()
    assert talk.turns == IN_ORDER[:1]
    assert "knows no patient" in final


@pytest.mark.parametrize(
    ("reason", "wanted"),
    [
        ("please mention the earlier appointment on Monday", "earlier appointment on Monday"),
        ("say how to take the medication", "1 capsule three times a day"),
        ("add that she must drink enough", "must drink enough"),
    ],
)
def test_a_rejection_that_asks_for_a_change_is_amended_and_asked_once_more(reason, wanted):
    talk = Conversation(notify_patient=[f"rejected by dr.lee: {reason}", {"status": "sent"}])
    final = talk.play()
    first, second = talk.of("notify_patient")
    assert wanted in second["text"]
    assert first["text"] != second["text"]
    assert len(talk.of("notify_providers")) == 1
    assert "not done" not in final


def test_a_shorter_text_is_shorter():
    talk = Conversation(notify_patient=["rejected by dr.lee: too long, plain language please", {"status": "sent"}])
    talk.play()
    first, second = talk.of("notify_patient")
    assert len(second["text"]) < len(first["text"])


def test_both_messages_may_be_rejected_at_once_and_both_are_amended():
    no = ["rejected by dr.lee: mention the follow-up", {"status": "sent"}]
    talk = Conversation(notify_patient=list(no), notify_providers=list(no))
    talk.play()
    assert talk.turns == [*IN_ORDER, IN_ORDER[-1]]


def test_a_second_rejection_ends_it():
    talk = Conversation(notify_patient="rejected by dr.lee: mention the follow-up")
    final = talk.play()
    assert len(talk.of("notify_patient")) == 2
    assert "mention the follow-up" in final
    assert "not done: patient notified" in final


@pytest.mark.parametrize("reason", ["she stays another night", "wrong patient", "no", "do not send, medication unsafe"])
def test_any_other_rejection_ends_it_and_quotes_the_reason(reason):
    talk = Conversation(
        notify_patient=f"rejected by dr.lee: {reason}", notify_providers=f"rejected by dr.lee: {reason}"
    )
    final = talk.play()
    assert not amendable(reason)
    assert talk.turns == IN_ORDER
    assert f"“{reason}”" in final


def test_a_notice_that_steps_have_no_outcome_is_answered_by_doing_them():
    talk = Conversation(write_summary=[FAILED, {"text": "written"}])
    talk.play()
    notice = "Finishing is refused: these critical steps have no outcome yet: summary. Do them, then finish."
    talk.messages.append({"role": "user", "content": notice})
    talk.play()
    assert talk.turns == [*IN_ORDER, {"write_summary"}]
    talk.messages.append({"role": "user", "content": notice})
    assert talk.turn() is not None, "what is done is not done again"


def test_a_notice_about_a_step_whose_outcome_is_unknown_never_repeats_it():
    talk = Conversation(notify_patient=UNKNOWN)
    assert "not known whether: patient notified" in talk.play()
    talk.messages.append({"role": "user", "content": "Finishing is refused: no outcome yet: notify."})
    assert talk.turn() is not None


def test_a_notice_about_a_tool_that_is_not_offered_is_answered_by_finishing_again():
    talk = Conversation(offered={t for turn in IN_ORDER for t in turn} - {"notify_providers"})
    talk.play()
    talk.messages.append({"role": "user", "content": "Finishing is refused: no outcome yet: notify."})
    assert "not done: providers notified" in (talk.turn() or "")


def test_what_no_longer_stands_and_what_was_not_done_for_that_is_called_again():
    void = "not done: what was done before was undone while this run was stopped, so decide again."
    talk = Conversation(notify_patient=[void, {"status": "sent"}], notify_providers=[void, {"status": "sent"}])
    for _ in range(4):
        assert talk.turn() is None
    gone = "#4 order_medication, #5 book_appointment"
    text = f"Undone while this run was stopped, and no longer standing: {gone}. Call again what is still needed."
    talk.messages.append({"role": "user", "content": text})
    talk.play()
    assert talk.turns[4:] == [{"order_medication", "book_appointment"}, {"notify_patient", "notify_providers"}]
    ids = [each["id"] for message in talk.messages for each in message.get("tool_calls", [])]
    assert len(set(ids)) == len(ids) == 12


def test_arguments_that_are_refused_are_mended_and_the_others_sent_again():
    """As the platform puts it: one wrong call keeps the others of the same answer from running."""
    skipped = "error: not run, because another call of the same answer was invalid; send all the calls again"
    wrong = (
        "error: the arguments of book_appointment do not fit its schema: not_after: Input should be a valid date; "
        "reason: String should have at most 9 characters"
    )
    placed = {"status": "placed"}
    talk = Conversation(
        verify_insurance=[skipped, {"coverage": "active"}],
        order_medication=[skipped, placed],
        book_appointment=[wrong, placed],
    )
    final = talk.play()
    assert talk.turns[1] == talk.turns[2] == IN_ORDER[1]
    assert talk.of("book_appointment")[1] == {"patient_id": "pat-1", "reason": "Follow-up", "not_before": "2026-11-28"}
    assert "follow-up booked" in final


def test_what_cannot_be_mended_is_not_sent_again():
    wrong = "bad arguments for book_appointment: patient_id: String should match pattern"
    talk = Conversation(book_appointment=wrong)
    talk.play()
    assert len(talk.of("book_appointment")) == 1


def test_mend_drops_and_fills():
    error = "bad arguments for t: extra: Extra inputs are not permitted; physician: Field required"
    assert mend({"extra": 1, "a": 2}, error, {"physician": "dr.lee"}) == {"a": 2, "physician": "dr.lee"}


def test_the_summary_is_written_from_the_facts_in_the_message():
    facts = {"name": "Ada", "stay": "pneumonia", "medications": ["Amoxicillin"], "open_points": ["pending pharmacist"]}
    messages = [
        {"role": "system", "content": SUMMARY_INSTRUCTIONS},
        {"role": "user", "content": json.dumps(facts)},
    ]
    text = decide(messages, [])["content"]
    assert text.startswith(LABEL)
    assert all(word in text for word in ("Ada", "pneumonia", "Amoxicillin", "pending pharmacist"))


def test_another_agent_gets_an_honest_stand_in():
    def tool(name: str, *required: str) -> dict[str, object]:
        schema = {"type": "object", "properties": {each: {} for each in required}, "required": list(required)}
        return {"type": "function", "function": {"name": name, "parameters": schema}}

    tools = [tool("weigh", "parcel"), tool("ship", "parcel", "address"), tool("clock")]
    messages = [{"role": "system", "content": "You ship."}, {"role": "user", "content": '{"parcel": 7}'}]
    first = decide(messages, tools)
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in first["tool_calls"]] == [
        ("weigh", '{"parcel": 7}'),
        ("clock", "{}"),
    ]
    messages.append(first)
    messages += [{"role": "tool", "tool_call_id": c["id"], "content": "12 kg"} for c in first["tool_calls"]]
    final = decide(messages, tools)["content"]
    assert final.startswith(LABEL)
    assert "stand-in" in final
    assert "12 kg" in final


def test_a_decision_depends_on_nothing_but_its_input():
    talk = Conversation("pat-2")
    talk.turn()
    assert decide(talk.messages, talk.tools) == decide(json.loads(json.dumps(talk.messages)), talk.tools)
    ids = [call["id"] for each in talk.messages for call in each.get("tool_calls", ())]
    talk.turn()
    ids += [call["id"] for call in talk.messages[-4]["tool_calls"]]
    assert len(ids) == len(set(ids))
