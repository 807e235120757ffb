"""A graph of one's own: what a LangGraph `StateGraph` needs to be the mind of an agent.

    class State(TurnState):
        kind: str

    async def classify(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
        answer = await runtime.context.ask([{"role": "user", "content": state["input"]["text"]}], tools=())
        return {"kind": answer.text}

    graph = StateGraph(State, context_schema=Turn)
    ...
    SPEC = AgentSpec(..., graph=graph)

One turn is one run of the graph from START to END, and ends in a decision: tool calls, or the run's final words. The
next turn begins at START with the calls' answers in its state; `begin_at` sends it back to where the decision was made.
The state lives on from turn to turn.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypedDict
from urllib.parse import quote

from langgraph.config import get_config
from langgraph.graph import END
from langgraph.runtime import get_runtime
from langgraph.types import Command

from holdfast.agent import AgentSpec
from holdfast.contracts import Json, OutcomeStatus
from holdfast.conversation import again, as_json, inbox_messages, parse
from holdfast.reliability import faults
from holdfast.reliability.faults import Point
from holdfast.tools import Tool

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from holdfast.answers import ModelAnswer


class BadGraph(Exception):
    """A mistake of the graph's author, in words for him. The run fails."""


# ------------------------------------------------------------------ state


def _latest(old: Any, new: Any) -> Any:
    """Several branches may hand the same value on, as subgraphs do with the keys they share."""
    return new


def _decided(old: Json | None, new: Json | None) -> Json | None:
    """Branches that decide in the same turn decide together."""
    if old is None or new is None or old == new:
        return new
    if old["final"] is not None or new["final"] is not None:
        raise BadGraph("two branches decided in one turn, and one of them said final words; only calls can be joined")
    return {"calls": old["calls"] + new["calls"], "then": [*dict.fromkeys(old["then"] + new["then"])], "final": None}


def _counted(old: dict[str, int], new: dict[str, int] | None) -> dict[str, int]:
    return {} if new is None else {**old, **new}


class TurnState(TypedDict):
    """What the state of every graph has. All of it is set by the platform, except `decision`."""

    input: Annotated[Json, _latest]
    """The run's input, as it was checked."""
    answers: Annotated[list[Json], _latest]
    """What became of the calls of the turn before; read it by `answers(state)`."""
    notices: Annotated[list[str], _latest]
    """What the platform has to say in this turn: a call that was put off has ended, a tool went or came back."""
    resume: Annotated[list[str], _latest]
    """The nodes that the turn before said to go on at; see `begin_at`."""
    decision: Annotated[Json | None, _decided]
    """None until a node decides: `calls(…)` or `final(…)`."""
    heard: Annotated[dict[str, int], _counted]
    """By tools node: how often it has sent invalid output back in this turn."""


@dataclass(frozen=True)
class Answer:
    """What became of one call."""

    tool: str
    arguments: Json
    status: OutcomeStatus
    content: str
    """What a model would read: the result, or in words what went wrong."""
    by: str
    """The node that decided the call."""
    id: str = ""
    """The model's own id of the call; empty for a call decided by code."""

    @property
    def ok(self) -> bool:
        return self.status is OutcomeStatus.OK

    @property
    def result(self) -> Any:
        """The tool's result as JSON data; the text itself when it is no JSON."""
        try:
            return json.loads(self.content)
        except ValueError:
            return self.content


def answers(state: Mapping[str, Any], by: str = "") -> list[Answer]:
    """The answers to the calls of the turn before, in their order; with `by`, those of the calls that node decided."""
    found = [Answer(**{**each, "status": OutcomeStatus(each["status"])}) for each in state["answers"]]
    return [each for each in found if not by or each.by == by]


# ------------------------------------------------------------------ deciding


def calls(*wanted: tuple[str, Json], then: str = "") -> Json:
    """The decision to make these calls: `return {"decision": calls(("read_document", {"path": path}))}`.

    wanted: tools and their arguments; checked when the turn ends. then: the node that `begin_at` goes on at.
    """
    by = _node()
    return {
        "calls": [{"tool": tool, "arguments": arguments, "by": by} for tool, arguments in wanted],
        "then": [then] if then else [],
        "final": None,
    }


def final(text: str, then: str = "") -> Json:
    """The decision to end the run with these words. It goes on at `then` should the platform not let it end yet."""
    return {"calls": [], "then": [then] if then else [], "final": text}


def begin_at(node: str) -> Callable[[TurnState], list[str]]:
    """For `graph.add_conditional_edges(START, begin_at("classify"))`: where the last turn said to go on, else there."""
    return Begin(node)


@dataclass(frozen=True)
class Begin:
    node: str

    def __call__(self, state: TurnState) -> list[str]:
        return state["resume"] or [self.node]


class Tools:
    """The node that stands where a `ToolNode` would: it ends the turn with the calls of the last message.

        graph.add_node("tools", tools(then="agent"))
        graph.add_conditional_edges(START, begin_at("agent"))

    The next turn begins at it, adds the answers to the messages and goes on at `then`. A last message without calls is
    the run's final words. Invalid calls go back to `then` with what is wrong, twice at most in a turn.
    """

    def __init__(self, then: str, messages: str, offered: Sequence[Tool | str] | None) -> None:
        self.then = then
        self.messages = messages
        self._offered = None if offered is None else {_name(each) for each in offered}

    async def __call__(self, state: Any) -> Command[Any]:
        context, me = get_runtime(Turn).context, _node()
        if _nested():
            raise BadGraph(f"node {me} decides the turn, so it belongs into the agent's own graph, not into a subgraph")
        faults.reached(Point.NODE_DONE, context.where)
        conversation = [as_json(each) for each in state[self.messages]]
        tries = state["heard"].get(me)
        if me in state["resume"] and tries is None:
            told = inbox_messages(conversation, [each.content for each in answers(state, by=me)], state["notices"])
            return Command(goto=self.then, update={self.messages: told, "heard": {me: 0}})
        if not conversation or conversation[-1].get("role") != "assistant":
            raise BadGraph(f"node {me} decides by the model's answer, and {self.messages!r} does not end with one")
        decision, problems = parse(conversation[-1], context.spec, self._offered)
        if decision is None:
            return Command(goto=self.then, update={self.messages: problems, "heard": {me: again(tries or 0, problems)}})
        ids = [call["id"] for call in conversation[-1].get("tool_calls") or []]
        made = [
            {**call.model_dump(), "by": me, "id": call_id} for call, call_id in zip(decision.calls, ids, strict=True)
        ]
        return Command(goto=END, update={"decision": {"calls": made, "then": [me], "final": decision.final}})


def tools(then: str, *, messages: str = "messages", offered: Sequence[Tool | str] | None = None) -> Tools:
    """The node that turns a model's tool calls into the turn's decision.

    then: the node that asks the model. messages: the state's key with the conversation, of OpenAI dicts or LangChain
    messages. offered: the tools that may be called from here; by default all of the agent's.
    """
    return Tools(then, messages, offered)


# ------------------------------------------------------------------ what a node may use


class Ask(Protocol):
    """Asks the model under this part of a key. What it has answered before, it answers again."""

    def __call__(
        self, key: str, messages: list[Json], tools: list[Json], must_call: bool
    ) -> Awaitable[ModelAnswer]: ...


@dataclass(frozen=True)
class Turn:
    """The `context` of a graph's runtime: what nodes need and no checkpoint holds."""

    spec: AgentSpec
    turn: int
    where: str
    """Names the turn at crash points."""
    withdrawn: frozenset[str]
    """Tools that cannot be had for now, because their service does not answer; they are not offered."""
    record: Ask
    open: frozenset[str] = frozenset()
    """Tools of critical steps that have no outcome yet: without them the run cannot end."""
    _asked: Counter[tuple[Any, ...]] = field(default_factory=Counter)

    async def ask(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Tool | str | Json] | None = None,
        name: str = "",
        must_call: bool = False,
    ) -> ModelAnswer:
        """One model call, recorded: a node that runs again after a crash gets the same answer, and pays nothing.

        messages: OpenAI dicts or LangChain messages. tools: what is offered, by default all of the agent's; `()` offers
        none; a dict is sent as it is. name: tells calls of one node apart that begin in no fixed order (`gather`).
        must_call: words are no answer while a tool is offered that a critical step needs (`tool_choice: required`).
        Raises what parks or ends the turn when no model answers: let it pass.
        """
        wanted = self.spec.tools if tools is None else tools
        entries = [each if isinstance(each, dict) else self._tool(each).openai for each in wanted]
        offered = [each for each in entries if each["function"]["name"] not in self.withdrawn]
        must_call = must_call and any(each["function"]["name"] in self.open for each in offered)
        return await self.record(self._key(name), [as_json(each) for each in messages], offered, must_call)

    def chat_model(self, name: str = "") -> BaseChatModel:
        """`ask` as a LangChain chat model, for nodes that were written for one. Asynchronous calls only."""
        from holdfast.chat import RecordedChatModel  # costs an import that only such graphs need

        return RecordedChatModel(turn=self, label=name)

    def _tool(self, tool: Tool | str) -> Tool:
        found = self.spec.by_name.get(_name(tool))
        if found is None:
            raise BadGraph(
                f"node {_node()} offers the tool {_name(tool)!r}, which agent {self.spec.name} does not have"
            )
        return found

    def _key(self, name: str) -> str:
        """Where in the turn the question stands: node, superstep, branch, and the count of questions asked there.

        The same for every attempt. Nothing in it is random but what a subgraph lies in, and that is checkpointed.
        """
        metadata = get_config()["metadata"]  # type: ignore[typeddict-item] - LangGraph always sets it in a node
        runtime = get_runtime(Turn)
        space = metadata["langgraph_checkpoint_ns"]
        execution = runtime.execution_info
        attempt = execution.node_attempt if execution else 1
        asked = (space, attempt, name)
        self._asked[asked] += 1
        place = [quote(metadata["langgraph_node"], safe=""), metadata["langgraph_step"]]
        place += _branches(metadata["langgraph_path"])
        if outer := space.rpartition("|")[0]:
            place.append(hashlib.sha256(outer.encode()).hexdigest()[:8])
        again = f"/{self._asked[asked]}" if self._asked[asked] > 1 else ""
        return "ask-" + ".".join(map(str, place)) + (f"/{quote(name, safe='')}" if name else "") + again


def _branches(path: Any) -> list[int]:
    """The numbers in a task's path: which of several `Send`s it is."""
    if isinstance(path, Sequence) and not isinstance(path, str):
        return [number for each in path for number in _branches(each)]
    return [path] if isinstance(path, int) and not isinstance(path, bool) else []


def _node() -> str:
    """The node that runs; empty outside of a graph."""
    try:
        return get_config().get("metadata", {}).get("langgraph_node", "")
    except RuntimeError:
        return ""


def _nested() -> bool:
    return "|" in get_config().get("metadata", {}).get("langgraph_checkpoint_ns", "")


def _name(tool: Tool | str) -> str:
    return tool if isinstance(tool, str) else tool.name
