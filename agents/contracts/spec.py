"""The contract batch: extracts key terms and a summary of every legal text in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from agents.contracts import tools
from agents.contracts.documents import address, files, located
from agents.contracts.results import write_index
from agents.contracts.workspace import Workspace
from holdfast import AgentSpec, BatchContext, BatchReport, BatchSpec, Item, StepSpec, ToolRefused, item_id


def _absolute(path: str) -> str:
    if not located(path).is_absolute():
        raise ValueError("has to be an absolute path: the worker is another process, maybe on another machine")
    return path


AbsolutePath = Annotated[str, AfterValidator(_absolute)]


class ContractInput(BaseModel):
    """One document."""

    model_config = ConfigDict(extra="forbid")

    path: AbsolutePath
    workspace: Annotated[AbsolutePath, Field(description="folder for the result")]
    id: str = ""
    name: str = ""


class ContractsInput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    folder: Annotated[AbsolutePath, Field(description="its files, and those below it")]
    workspace: Annotated[
        AbsolutePath | Literal[""], Field(description="folder for the results; default: HOLDFAST_HOME/workspace/RUN")
    ] = ""


SPEC = AgentSpec(
    name="contract",
    description="Extracts the key terms of one legal text and summarises them.",
    instructions="",
    input=ContractInput,
    tools=(tools.read, tools.extract, tools.summarise, tools.save),
    steps=(
        StepSpec(name="read", title="Text", tools=["read"]),
        StepSpec(name="extract", title="Key terms", tools=["extract"]),
        StepSpec(name="summarise", title="Summary", tools=["summarise"]),
        StepSpec(name="save", title="Result", tools=["save"]),
    ),
    deadline=timedelta(days=30),
    graph="agents.contracts.graph:GRAPH",
)

# ------------------------------------------------------------------ all documents of a folder


def _items(given: ContractsInput, context: BatchContext) -> Sequence[Item]:
    """Returns every file except hidden files, links and the contents of the workspace."""
    folder, place = Path(given.folder), _place(given, context)
    if not folder.is_dir():
        raise ToolRefused(f"there is no folder {folder} on the machine of the worker that reads")
    real = folder.resolve()
    if real.is_relative_to(place.resolve()):
        raise ToolRefused(
            f"the folder is inside the workspace {place}, which holds results and no documents: name another one"
        )
    Workspace(place).belongs_to(real)
    names = (str(path.relative_to(real)) for path in files(real, but=place.resolve()))
    return [_item(name, folder / name, place) for name in names]


def _item(name: str, path: Path, place: Path) -> Item:
    id = item_id(name)
    # A file name may hold any bytes; people and their terminals get only printable characters.
    shown = "".join(each if each.isprintable() else "\ufffd" for each in name)
    return Item(id=id, name=shown, input={"id": id, "name": shown, "path": address(path), "workspace": str(place)})


def _report(given: ContractsInput, context: BatchContext, report: BatchReport) -> str:
    return write_index(Workspace(_place(given, context)), report.items, report.failures, report.ended)


def _place(given: ContractsInput, context: BatchContext) -> Path:
    return Path(given.workspace) if given.workspace else context.workspace


BATCH = BatchSpec(
    name="contracts",
    description="Key terms and a summary of every legal text in a folder, with an index.",
    input=ContractsInput,
    agent=SPEC,
    items=_items,
    report=_report,
    queue="read",
    unit="documents",
)
