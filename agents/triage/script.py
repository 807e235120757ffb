"""The triage agent's rules for the scripted model: words that identify the desk, then what each desk does."""

from __future__ import annotations

from collections.abc import Sequence

from agents.triage.prompts import CLASSIFY, DESKS
from holdfast import Json
from holdfast.dev.simulation.script import LABEL, Talk, ask, say

WORDS = {
    "clinical": ("pain", "fever", "medication", "tablet", "dizzy", "breath", "rash", "bleeding", "blood", "symptom"),
    "appointments": ("appointment", "visit", "reschedule", "cancel", "move my", "opening hours", "book a"),
    "billing": ("invoice", "bill", "payment", "pay ", "insurance", "instalment", "refund"),
}
URGENT = ("chest pain", "breath", "bleeding", "faint")


def decide(messages: Sequence[Json], tools: Sequence[Json]) -> Json | None:
    system = messages[0].get("content") if messages else None
    if system == CLASSIFY:
        return {"role": "assistant", "content": classify(str(Talk.of(messages).data.get("text", "")))}
    desk = next((name for name, prompt in DESKS.items() if prompt == system), None)
    return work(desk, Talk.of(messages)) if desk else None


def classify(text: str) -> str:
    """Returns the desk whose words are in the text; "unsure" when words of several desks match, or none do."""
    found = [desk for desk, words in WORDS.items() if any(word in text.lower() for word in words)]
    return found[0] if len(found) == 1 else "unsure"


def work(desk: str, talk: Talk) -> Json:
    text, sender = str(talk.data.get("text", "")), str(talk.data.get("sender", ""))
    title = " ".join(text.split())[:80]
    if desk == "clinical":
        urgency = "now" if any(word in text.lower() for word in URGENT) else "today"
        ticket = {"desk": "nurses", "urgency": urgency, "title": title, "details": text}
        return _then(talk, ("open_ticket", ticket), f"The nurses have a ticket, urgency {urgency}.")
    topic = "visits" if desk == "appointments" else "payment"
    if talk.last("clinic_facts") is None:
        return ask(talk, ("clinic_facts", {"topic": topic}))
    if desk == "appointments" and talk.last("open_ticket") is None:
        ticket = {"desk": "scheduling", "urgency": "routine", "title": title, "details": text}
        return ask(talk, ("open_ticket", ticket))
    facts = talk.tries["clinic_facts"][-1].answer
    next_step = "The scheduling desk has your message. " if desk == "appointments" else ""
    reply = {"to": sender, "subject": f"Your message: {title[:120]}", "text": f"{LABEL}{next_step}{facts}"}
    return _then(talk, ("send_reply", reply), f"Replied to {sender}.")


def _then(talk: Talk, call: tuple[str, Json], end: str) -> Json:
    """Makes the call, or ends with this text once the call has an answer."""
    made = talk.last(call[0])
    if made is None:
        return ask(talk, call)
    if made.rejection:
        return say(f"The reply was rejected: {made.rejection}")
    return say(end if made.done else f"{call[0]} did not work: {made.answer}")
