"""The discharge agent's rules for the scripted model.

They react only to the conversation: unknown records, failed and pending steps, rejections, notices, errors about their
arguments. They do not know the hospital's state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast import Json
from holdfast.dev.simulation.script import LABEL, Call, Talk, ask, offered, say, transcript

STEPS = {
    "record": ("read_record", "read_orders"),
    "insurance": ("verify_insurance",),
    "pharmacy": ("order_medication",),
    "appointments": ("book_appointment",),
    "summary": ("write_summary",),
    "notify": ("notify_patient", "notify_providers"),
}
_TOOLS = {tool for tools in STEPS.values() for tool in tools}
_MESSAGES = STEPS["notify"]


def decide(messages: Sequence[Json], tools: Sequence[Json]) -> Json | None:
    talk = Talk.of(messages)
    if len(_TOOLS & (offered(tools) | talk.tries.keys())) > 1:
        agent = Discharge(talk, offered(tools))
        calls = agent.calls()
        return ask(talk, *calls) if calls else say(agent.final())
    if not tools and "discharge summary" in transcript(messages).lower() and talk.data:
        return say(summary(talk.data))
    return None


# ------------------------------------------------------------------ what the record says


@dataclass
class Facts:
    """The data of any patient's FHIR record that a discharge needs. Empty where the record says nothing."""

    patient_id: str
    name: str = ""
    phone: str = ""
    email: str = ""
    address: str = ""
    practitioner: str = ""
    stay: str = ""
    diagnoses: list[str] = field(default_factory=list)
    items: list[Json] = field(default_factory=list)
    visit: str = ""
    not_before: str = ""
    not_after: str = ""

    @classmethod
    def of(cls, patient_id: str, *bundles: Any) -> Facts:
        facts = cls(patient_id)
        for resource in _resources(bundles):
            match resource["resourceType"]:
                case "Patient":
                    facts._patient(resource)
                case "Encounter":
                    facts.stay = "; ".join(filter(None, map(_concept, resource.get("reasonCode", []))))
                case "Condition":
                    facts.diagnoses += filter(None, [_concept(resource.get("code"))])
                case "MedicationRequest" if resource.get("status") in ("active", None):
                    dosage = "; ".join(each["text"] for each in resource.get("dosageInstruction", []) if "text" in each)
                    if name := _concept(resource.get("medicationCodeableConcept")):
                        facts.items.append({"name": name, "dosage": dosage} if dosage else {"name": name})
                case "ServiceRequest" if resource.get("status") in ("active", None):
                    facts.visit = facts.visit or _concept(resource.get("code"))
                    when = resource.get("occurrencePeriod", {})
                    facts.not_before, facts.not_after = when.get("start", "")[:10], when.get("end", "")[:10]
        return facts

    def _patient(self, resource: Json) -> None:
        for name in resource.get("name", [])[:1]:
            self.name = name.get("text") or " ".join([*name.get("given", []), name.get("family", "")]).strip()
        for contact in resource.get("telecom", []):
            if contact.get("system") == "phone":
                self.phone = self.phone or contact.get("value", "")
            if contact.get("system") == "email":
                self.email = self.email or contact.get("value", "")
        for home in resource.get("address", [])[:1]:
            parts = [*home.get("line", []), f"{home.get('postalCode', '')} {home.get('city', '')}".strip()]
            self.address = home.get("text") or ", ".join(filter(None, parts))
        for each in resource.get("generalPractitioner", [])[:1]:
            self.practitioner = each.get("display", "")

    @property
    def window(self) -> str:
        """When the follow-up is due, as text."""
        words = [
            f"from {self.not_before}" if self.not_before else "",
            f"until {self.not_after}" if self.not_after else "",
        ]
        return " ".join(filter(None, words))


def _resources(value: Any) -> Iterator[Json]:
    """Yields every FHIR resource in a JSON value, including those inside bundles."""
    if isinstance(value, dict):
        if "resourceType" in value and value["resourceType"] != "Bundle":
            yield value
        else:
            yield from _resources(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _resources(each)


def _concept(value: Any) -> str:
    """Returns the text of a CodeableConcept."""
    if not isinstance(value, dict):
        return ""
    return value.get("text") or next((each["display"] for each in value.get("coding", []) if "display" in each), "")


# ------------------------------------------------------------------ the discharge agent

_CANNOT = re.compile(
    r"\b(wrong|unsafe|not (?:ready|safe|fit)|stop|abort|do not (?:send|discharge|notify)|stays?)\b", re.I
)
_PLAIN = re.compile(r"\b(plain\w*|simpl\w*|short\w*|brief\w*|jargon|wording|concise|reword\w*|language)\b", re.I)
_VISIT = re.compile(r"\b(appointments?|follow-?ups?|visits?|earlier)\b", re.I)
_DRUGS = re.compile(r"\b(pharmac\w+|medic\w+|dos(?:e|es|age)|drugs?)\b", re.I)
_ADD = re.compile(r"\b(add|include|mention|say|state|tell|explain|name)\b", re.I)


def amendable(reason: str) -> bool:
    """Whether a rejection asks for a change of the text that this script can make."""
    return not _CANNOT.search(reason) and any(each.search(reason) for each in (_PLAIN, _VISIT, _DRUGS, _ADD))


class Discharge:
    """One turn of the discharge agent."""

    def __init__(self, talk: Talk, offered: set[str]) -> None:
        self._talk = talk
        self._offered = offered
        self.facts = Facts.of(
            str(talk.data.get("patient_id", "")), talk.result("read_record"), talk.result("read_orders")
        )
        self._stop = self._reason_to_stop()

    def calls(self) -> list[Call]:
        """Returns the calls of this turn; none when the run is to end."""
        if self._stop:
            return []
        for stage in (self._reading, self._arranging, self._summing_up, self._notifying):
            if calls := [call for call in stage() if call]:
                return calls
        return []

    def _reason_to_stop(self) -> str:
        for tool, tries in self._talk.tries.items():
            reasons = [each.rejection for each in tries if each.rejection]
            if not reasons or tries[-1].rejection is None:
                continue
            if tool not in _MESSAGES or len(reasons) > 1 or not amendable(reasons[-1]):
                return f"Stopped: {tool} was rejected: “{reasons[-1]}”."
        record = self._talk.last("read_record")
        if record and record.refused:
            return f"Stopped: the record could not be read: “{record.answer}”."
        return ""

    def _call(self, tool: str, arguments: Json) -> Call | None:
        """Returns the call if it is due: not made yet, to be repeated, or to be repeated with corrected arguments."""
        if tool not in self._offered:
            return None
        tries = self._talk.tries.get(tool, [])
        if not tries:
            return tool, arguments
        last = tries[-1]
        if last.skipped and len(tries) <= 3:
            return tool, arguments
        if last.invalid:
            mended = mend(last.arguments, last.answer, {**self.facts.__dict__, **self._talk.data})
            return (tool, mended) if mended not in [each.arguments for each in tries] else None
        open_still = not (last.done or last.rejection or any(each.unknown for each in tries))
        return (tool, arguments) if open_still and self._demanded(tool) and last.at < self._talk.noticed_at else None

    def _demanded(self, tool: str) -> bool:
        """Whether the platform's last notice names this tool or its step."""
        names = [tool, *(step for step, tools in STEPS.items() if tool in tools)]
        return any(re.search(rf"\b{name}\b", self._talk.notice) for name in names)

    # ---- the stages

    def _reading(self) -> list[Call | None]:
        return [self._call(tool, {"patient_id": self.facts.patient_id}) for tool in STEPS["record"]]

    def _arranging(self) -> list[Call | None]:
        patient, facts = {"patient_id": self.facts.patient_id}, self.facts
        visit = {"reason": facts.visit, "not_before": facts.not_before, "not_after": facts.not_after}
        return [
            self._call("verify_insurance", patient),
            self._call("order_medication", patient | {"items": facts.items}) if facts.items else None,
            self._call("book_appointment", patient | {k: v for k, v in visit.items() if v}) if facts.visit else None,
        ]

    def _summing_up(self) -> list[Call | None]:
        facts = self.facts
        arguments = {
            "patient_id": facts.patient_id,
            "name": facts.name or f"patient {facts.patient_id}",
            "stay": facts.stay or "not stated in the record",
            "diagnoses": facts.diagnoses,
            "medications": [": ".join(filter(None, (each["name"], each.get("dosage")))) for each in facts.items],
            "follow_up": self._visit_line(),
            "open_points": self.open_points(),
        }
        return [self._call("write_summary", arguments)]

    def _notifying(self) -> list[Call | None]:
        facts, patient = self.facts, {"patient_id": self.facts.patient_id}
        recipients = list(filter(None, [str(self._talk.data.get("physician", "")), facts.practitioner])) or ["ward"]
        reached = (
            {"channel": "phone", "to": facts.phone}
            if facts.phone
            else {"channel": "email", "to": facts.email}
            if facts.email
            else {"channel": "letter", "to": facts.address}
            if facts.address
            else {"channel": "providers", "to": recipients[0]}
        )
        return [
            self._message("notify_patient", patient | reached, self._patient_text),
            self._message("notify_providers", patient | {"recipients": recipients}, self._providers_text),
        ]

    def _message(self, tool: str, arguments: Json, text: Any) -> Call | None:
        last = self._talk.last(tool)
        reason = next((each.rejection for each in self._talk.tries.get(tool, []) if each.rejection), "")
        arguments = arguments | {"text": LABEL + text(reason)[:3900]}
        if last and last.rejection and tool in self._offered:
            return tool, arguments
        return self._call(tool, arguments)

    # ---- the words

    def _done(self, tool: str) -> bool:
        return self._talk.result(tool) is not None

    def open_points(self) -> list[str]:
        """Returns the points that a person must still settle, as far as this conversation shows."""
        coverage = self._talk.result("verify_insurance")
        points = []
        if not self._talk.result("read_orders"):
            points.append("orders could not be read")
        if coverage is None:
            points.append("insurance not verified: pending billing")
        elif coverage.get("coverage") != "active" and "settled" not in coverage:
            points.append(f"insurance: {coverage.get('detail') or coverage.get('coverage')}; for billing to clarify")
        if self.facts.items and not self._done("order_medication"):
            points.append("medication order not confirmed: pending pharmacist")
        if self.facts.visit and not self._done("book_appointment"):
            points.append("follow-up not booked: pending scheduling desk")
        if not (self.facts.phone or self.facts.email):
            points.append("no phone or e-mail on record")
        return points

    def _visit_line(self) -> str:
        if not self.facts.visit:
            return ""
        state = "booked" if self._done("book_appointment") else "not booked yet"
        return f"{self.facts.visit}{', ' + self.facts.window if self.facts.window else ''} ({state})"

    def _drug_lines(self) -> str:
        return "; ".join(
            f"{each['name']}{', ' + each['dosage'] if each.get('dosage') else ''}" for each in self.facts.items
        )

    def _patient_text(self, reason: str) -> str:
        facts = self.facts
        lines = [f"Dear {facts.name or 'patient'}, you can go home soon."]
        if facts.items:
            ordered = self._done("order_medication")
            how = (
                "has been ordered at the pharmacy"
                if ordered
                else "is being arranged by the pharmacist, who will tell you when it is ready"
            )
            lines.append(f"Your medication {how}.")
        if facts.visit:
            booked = self._done("book_appointment")
            when = f" ({facts.window})" if facts.window else ""
            lines.append(
                f"Your follow-up appointment is booked: {facts.visit}{when}."
                if booked
                else f"Your follow-up ({facts.visit}) is not booked yet; the scheduling desk will contact you."
            )
        if not _PLAIN.search(reason):
            lines.append(f"Reason for your stay: {facts.stay or 'see your papers'}.")
            lines.append(f"To take at home: {self._drug_lines() or 'nothing was ordered'}.")
            coverage = self._talk.result("verify_insurance")
            if coverage is None or coverage.get("coverage") != "active":
                lines.append("Billing will contact you about your insurance.")
        return " ".join([*lines, *self._requested(reason)])

    def _providers_text(self, reason: str) -> str:
        written = self._talk.result("write_summary")
        text = written.get("text", "") if isinstance(written, dict) else ""
        if not text or _PLAIN.search(reason):
            text = (
                f"{self.facts.name or self.facts.patient_id}: {self.facts.stay or 'discharge'}. {self._visit_line()}."
            )
        unsaid = "; ".join(point for point in self.open_points() if point not in text)
        points = [f"Open points: {unsaid}."] if unsaid else []
        return " ".join([text.removeprefix(LABEL), *points, *self._requested(reason)])

    def _requested(self, reason: str) -> list[str]:
        """Returns the lines that a rejection asked for."""
        lines = []
        if reason and _DRUGS.search(reason):
            lines.append(f"Medication: {self._drug_lines() or 'none ordered'}.")
        if reason and _VISIT.search(reason):
            lines.append(f"Follow-up: {self._visit_line() or 'none ordered'}.")
        if reason and (lines or _ADD.search(reason)):
            lines.append(f"At the physician's request: {reason}")
        return lines

    def final(self) -> str:
        """Returns the final answer: what was done, what is pending, and why the agent stopped if it did."""
        did = {
            "read_record": "record read",
            "verify_insurance": "insurance checked",
            "order_medication": "medication ordered",
            "book_appointment": "follow-up booked",
            "write_summary": "summary written",
            "notify_patient": "patient notified",
            "notify_providers": "providers notified",
        }
        done = [words for tool, words in did.items() if self._done(tool)]
        pending = self.open_points()
        for tool in ("write_summary", *_MESSAGES):
            if not self._done(tool):
                last = self._talk.last(tool)
                pending.append(f"{'not known whether' if last and last.unknown else 'not done'}: {did[tool]}")
        who = self.facts.name or "patient"
        text = f"Discharge of {who} ({self.facts.patient_id or 'no id given'}). Done: {', '.join(done) or 'nothing'}."
        text += f" Pending: {'; '.join(pending) or 'nothing'}."
        text += "".join(f" Heard from {said}." for said in self._talk.messages)
        return f"{self._stop} {text}".strip()


def mend(arguments: Json, error: str, facts: Json) -> Json:
    """Corrects the arguments as far as the script can. The error has the form `field: what is wrong; field: …`."""
    mended = dict(arguments)
    for name, what in re.findall(
        r"(\w+)(?:\.[\w.]+)?: ([^;]+)", re.sub(r"^.*?(schema|bad arguments for \w+):", "", error)
    ):
        if "not permitted" in what or "valid date" in what:
            mended.pop(name, None)
        elif "required" in what and facts.get(name):
            mended[name] = facts[name]
        elif (limit := re.search(r"at most (\d+) character", what)) and isinstance(mended.get(name), str):
            mended[name] = mended[name][: int(limit[1])]
    return mended


def summary(data: Json) -> str:
    """Answers the model call of `write_summary`: a discharge summary from the facts in the request."""

    def words(name: str) -> str:
        value = data.get(name)
        return ("; ".join(map(str, value)) if isinstance(value, list) else str(value or "")) or "none"

    return (
        f"{words('name')} was treated for: {words('stay')}. Diagnoses: {words('diagnoses')}. "
        f"Medication: {words('medications')}. Follow-up: {words('follow_up')}. Open points: {words('open_points')}."
    )
