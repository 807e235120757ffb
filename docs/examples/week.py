"""The batch week: the agent rooms, once for each topic."""

from pydantic import BaseModel

from docs.examples.rooms import SPEC
from holdfast import BatchContext, BatchReport, BatchSpec, Item, item_id


class Week(BaseModel):
    topics: list[str]


def _items(given: Week, context: BatchContext) -> list[Item]:
    return [Item(id=item_id(topic), name=topic, input={"topic": topic}) for topic in given.topics]


def _report(given: Week, context: BatchContext, report: BatchReport) -> str:
    context.workspace.mkdir(parents=True, exist_ok=True)
    file = context.workspace / "failures.txt"
    file.write_text("\n".join(f"{each.name}: {each.why}" for each in report.failures))
    return f"failures are in {file}"


BATCH = BatchSpec(
    name="week",
    description="One meeting for each topic.",
    input=Week,
    agent=SPEC,
    items=_items,
    report=_report,
)
