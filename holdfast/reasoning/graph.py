"""What a LangGraph `StateGraph` needs to decide an agent's turns.

    class State(TurnState):
        kind: str

    async def classify(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
        answer = await runtime.context.ask([{"role": "user", "content": state["input"]["text"]}], tools=())
        return {"kind": answer.text}

    graph = StateGraph(State, context_schema=Turn)
    ...
    SPEC = AgentSpec(..., graph=graph)

One turn executes the graph from START to END and ends in a decision: tool calls, or the run's final answer. The next
turn begins at START with the calls' answers in its state; `begin_at` routes it back to the node that decided. The state
is kept from turn to turn.
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

from holdfast.authoring.agent import AgentSpec
from holdfast.authoring.tools import Tool
from holdfast.contracts.data import Json
from holdfast.contracts.turn import Decision, OutcomeStatus
from holdfast.reasoning.conversation import again, as_json, inbox_messages, parse
from holdfast.reliability import crash_points
from holdfast.reliability.crash_points import Point

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from holdfast.authoring.options import ModelAnswer


class BadGraph(Exception):
    """A mistake in the graph. The message is for the graph's author; the run fails."""


# ------------------------------------------------------------------ state


def _latest(old: Any, new: Any) -> Any:
    """Takes the new value. Several branches may pass the same value on, as subgraphs do with shared keys."""
    return new


def _decided(old: Json | None, new: Json | None) -> Json | None:
    """Combines the decisions of branches that decide in the same turn."""
    if old is None or new is None or old == new:
        return new
    if old["final"] is not None or new["final"] is not None:
        raise BadGraph(
            "two branches decided in one turn, one of them final(…), and only calls(…) can be combined:"
            " return final(…) from one branch only"
        )
    return {"calls": old["calls"] + new["calls"], "then": [*dict.fromkeys(old["then"] + new["then"])], "final": None}


def _counted(old: dict[str, int], new: dict[str, int] | None) -> dict[str, int]:
    return {} if new is None else {**old, **new}


class TurnState(TypedDict):
    """The keys that every graph's state has. The platform sets all of them, except `decision`."""

    input: Annotated[Json, _latest]
    """The run's input, validated."""
    answers: Annotated[list[Json], _latest]
    """The answers to the previous turn's calls; read them with `answers(state)`."""
    notices: Annotated[list[str], _latest]
    """The platform's notices for this turn: a deferred call has ended, a tool was withdrawn or is available again."""
    resume: Annotated[list[str], _latest]
    """The nodes at which the previous turn's decision asked to go on; see `begin_at`."""
    decision: Annotated[Json | None, _decided]
    """None until a node decides: `calls(…)` or `final(…)`."""
    heard: Annotated[dict[str, int], _counted]
    """By tools node: how often it has sent invalid output back to the model in this turn."""


@dataclass(frozen=True)
class Answer:
    """The answer to one call."""

    tool: str
    arguments: Json
    status: OutcomeStatus
    content: str
    """The text for a model: the result, or a description of the error."""
    by: str
    """The node that decided the call."""
    id: str = ""
    """The model's id of the call; empty for a call that code decided."""

    @property
    def ok(self) -> bool:
        return self.status is OutcomeStatus.OK

    @property
    def result(self) -> Any:
        """The tool's result as JSON data; the text itself when it is not JSON."""
        try:
            return json.loads(self.content)
        except ValueError:
            return self.content


def answers(state: Mapping[str, Any], by: str = "") -> list[Answer]:
    """Returns the answers to the previous turn's calls, in order; with `by`, only to the calls of that node."""
    found = [Answer(**{**each, "status": OutcomeStatus(each["status"])}) for each in state["answers"]]
    return [each for each in found if not by or each.by == by]


# ------------------------------------------------------------------ deciding


def calls(*wanted: tuple[str, Json], then: str = "") -> Json:
    """Returns the decision to make these calls: `return {"decision": calls(("read_document", {"path": path}))}`.

    wanted: tools and their arguments, validated when the turn ends. then: the node at which `begin_at` goes on.
    """
    by = _node()
    return {
        "calls": [{"tool": tool, "arguments": arguments, "by": by} for tool, arguments in wanted],
        "then": [then] if then else [],
        "final": None,
    }


def final(text: str, then: str = "") -> Json:
    """Returns the decision to end the run with this text. If the platform refuses it, the run goes on at `then`."""
    return {"calls": [], "then": [then] if then else [], "final": text}


def decided(decision: Decision, message: Json, by: str, turn: Turn) -> Json:
    """Returns a model's decision as the state holds it. message: where it was read. by: the node that decided."""
    ids = [call["id"] for call in message.get("tool_calls") or ()]
    made = [{**call.model_dump(), "by": by, "id": id} for call, id in zip(decision.calls, ids, strict=True)]
    crash_points.reached(Point.NODE_DONE, turn.where)
    return {"calls": made, "then": [by], "final": decision.final}


def begin_at(node: str) -> Callable[[TurnState], list[str]]:
    """Routes a turn to the nodes that the previous decision named, else to `node`.

    Use: `graph.add_conditional_edges(START, begin_at("classify"))`.
    """
    return Begin(node)


@dataclass(frozen=True)
class Begin:
    node: str

    def __call__(self, state: TurnState) -> list[str]:
        return state["resume"] or [self.node]


class Tools:
    """A node in the place of a `ToolNode`: it ends the turn with the tool calls of the last message.

        graph.add_node("tools", tools(then="agent"))
        graph.add_conditional_edges(START, begin_at("agent"))

    The next turn begins at this node, which adds the answers to the messages and goes on at `then`. The text of a last
    message without calls is the run's final answer. For invalid calls it goes back to `then` with the errors, twice at
    most in a turn.
    """

    def __init__(self, then: str, messages: str, offered: Sequence[Tool | str] | None) -> None:
        self.then = then
        self.messages = messages
        self._offered = None if offered is None else {_name(each) for each in offered}

    async def __call__(self, state: Any) -> Command[Any]:
        context, me = get_runtime(Turn).context, _node()
        if _nested():
            raise BadGraph(f"node {me} decides the turn, so it belongs in the agent's own graph, not in a subgraph")
        conversation = [as_json(each) for each in state[self.messages]]
        tries = state["heard"].get(me)
        if me in state["resume"] and tries is None:
            told = inbox_messages(conversation, [each.content for each in answers(state, by=me)], state["notices"])
            return Command(goto=self.then, update={self.messages: told, "heard": {me: 0}})
        if not conversation or conversation[-1].get("role") != "assistant":
            raise BadGraph(f"node {me} needs a model's answer to decide, and {self.messages!r} does not end with one")
        decision, problems = parse(conversation[-1], context.spec, self._offered)
        if decision is None:
            return Command(goto=self.then, update={self.messages: problems, "heard": {me: again(tries or 0, problems)}})
        return Command(goto=END, update={"decision": decided(decision, conversation[-1], me, context)})


def tools(then: str, *, messages: str = "messages", offered: Sequence[Tool | str] | None = None) -> Tools:
    """Returns a node that turns a model's tool calls into the turn's decision.

    then: the node that asks the model. messages: the state's key of the conversation, a list of OpenAI dicts or
    LangChain messages. offered: the tools that this node accepts calls of; by default all of the agent's.
    """
    return Tools(then, messages, offered)


# ------------------------------------------------------------------ what a node may use


class Ask(Protocol):
    """Asks the model under this part of a key. A key that has a recorded answer gets that answer again."""

    def __call__(
        self, key: str, messages: list[Json], tools: list[Json], must_call: bool
    ) -> Awaitable[ModelAnswer]: ...


@dataclass(frozen=True)
class Turn:
    """The `context` of a graph's runtime: what nodes need and checkpoints do not hold."""

    spec: AgentSpec
    turn: int
    where: str
    """The turn's name at crash points."""
    withdrawn: frozenset[str]
    """Tools that are not offered for now, because their service does not answer."""
    record: Ask
    open: frozenset[str] = frozenset()
    """Tools of critical steps without an outcome: the run cannot end without them."""
    _asked: Counter[tuple[Any, ...]] = field(default_factory=Counter)

    async def ask(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Tool | str | Json] | None = None,
        name: str = "",
        must_call: bool = False,
    ) -> ModelAnswer:
        """Makes one model call and records it: a node that runs again after a crash gets the same answer at no cost.

        messages: OpenAI dicts or LangChain messages. tools: the tools to offer, by default all of the agent's; `()`
        offers none; a dict is sent as it is. name: distinguishes the calls of one node that start in no fixed order
        (`gather`). must_call: the model must call a tool while a tool that a critical step needs is offered
        (`tool_choice: required`).
        When no model answers, it raises an exception that parks or ends the turn: do not catch it.
        """
        wanted = self.spec.tools if tools is None else tools
        entries = [each if isinstance(each, dict) else self._tool(each).openai for each in wanted]
        offered = [each for each in entries if each["function"]["name"] not in self.withdrawn]
        must_call = must_call and any(each["function"]["name"] in self.open for each in offered)
        return await self.record(self._key(name), [as_json(each) for each in messages], offered, must_call)

    def chat_model(self, name: str = "") -> BaseChatModel:
        """Returns `ask` as a LangChain chat model, for nodes written for LangChain. Asynchronous calls only."""
        from holdfast.reasoning.chat_model import RecordedChatModel  # an expensive import that few graphs need

        return RecordedChatModel(turn=self, label=name)

    def _tool(self, tool: Tool | str) -> Tool:
        found = self.spec.by_name.get(_name(tool))
        if found is None:
            raise BadGraph(
                f"node {_node()} offers the tool {_name(tool)!r}, which agent {self.spec.name} does not have"
            )
        return found

    def _key(self, name: str) -> str:
        """Returns the position of a model call in the turn: node, superstep, branch, and its number there.

        It is the same in every attempt. Its only random part is the namespace of a subgraph, which is checkpointed.
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
    """Returns the numbers in a task's path, which say which of several `Send`s it is."""
    if isinstance(path, Sequence) and not isinstance(path, str):
        return [number for each in path for number in _branches(each)]
    return [path] if isinstance(path, int) and not isinstance(path, bool) else []


def _node() -> str:
    """Returns the running node's name; empty outside of a graph."""
    try:
        return get_config().get("metadata", {}).get("langgraph_node", "")
    except RuntimeError:
        return ""


def _nested() -> bool:
    return "|" in get_config().get("metadata", {}).get("langgraph_checkpoint_ns", "")


def _name(tool: Tool | str) -> str:
    return tool if isinstance(tool, str) else tool.name
