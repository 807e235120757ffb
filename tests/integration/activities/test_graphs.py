"""Graphs of one's own: what their authors may rely on, without crashes; those are in test_graph_crashes."""

from __future__ import annotations

import asyncio
import operator
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.runtime import Runtime
from langgraph.types import Send
from temporalio.exceptions import ApplicationError

from activities.plan import Plan
from holdfast.contracts.turn import OutcomeStatus
from holdfast.reasoning.default_graph import Conversation
from holdfast.reasoning.graph import Turn, TurnState, answers, begin_at, calls, final, tools
from holdfast.reasoning.loading import check
from holdfast.testing.model import call, say
from tests.integration.activities.conftest import Process
from tests.integration.activities.graphs import State, after, asked, line, of


@pytest.fixture
def plan(process: Process) -> Any:
    process.model.script = lambda messages: say(f"answer {messages[-1]['content']}")
    return Plan(process.runtime).plan


# ------------------------------------------------------------------ code that decides


def walk(state: State) -> dict[str, Any]:
    """Books, looks at what was booked, and ends."""
    heard = answers(state)
    if not heard:
        return {"decision": calls(("book", {"n": 1}), ("book", {"n": 2}))}
    if heard[0].tool == "book":
        return {"log": [each.content for each in heard], "decision": calls(("look", {"n": heard[1].arguments["n"]}))}
    return {"decision": final(f"{state['log']} {heard[0].result['seen']} {heard[0].status}")}


async def test_a_graph_without_a_model_decides_by_code_and_reads_the_answers(process: Process, plan: Any) -> None:
    request = of(line(walk))
    first = await process.run(plan, request)
    assert [(each.tool, each.arguments, each.version) for each in first.calls] == [
        ("book", {"n": 1}, "1"),
        ("book", {"n": 2}, "1"),
    ]
    request = after(request, first, "booked", "booked too")
    second = await process.run(plan, request)
    assert [(each.tool, each.arguments) for each in second.calls] == [("look", {"n": 2})]
    failed = [OutcomeStatus.FAILED]
    third = await process.run(plan, after(request, second, '{"seen": 3}', statuses=failed))
    assert third.final == "['booked', 'booked too'] 3 failed"
    assert (third.usage.calls, third.model, process.model.requests) == (0, "", [])


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (("boook", {}), "node walk calls the tool 'boook'; the tools are: book, look"),
        (("book", {"n": "x"}), "node walk calls book with arguments that do not fit: n: Input should be a valid int"),
    ],
)
async def test_a_call_by_code_that_does_not_validate_names_its_node(
    process: Process, plan: Any, wanted: Any, words: str
) -> None:
    def walk(state: State) -> dict[str, Any]:
        return {"decision": calls(wanted)}

    request = of(line(walk))
    with pytest.raises(ApplicationError, match=words) as caught:
        await process.run(plan, request)
    assert caught.value.non_retryable


async def test_a_graph_that_ends_without_a_decision_is_its_authors_mistake(process: Process, plan: Any) -> None:
    async def nothing(state: State) -> dict[str, Any]:
        return {"log": ["seen"]}

    with pytest.raises(ApplicationError, match="the graph ended without a decision") as caught:
        await process.run(plan, of(line(nothing)))
    assert caught.value.non_retryable


@pytest.mark.parametrize(
    ("decided", "words"),
    [
        ("done", "has to be what calls.* returns; it is str"),
        ({"final": "done"}, "has to be what calls.* returns; it is dict"),
        (final({"all": "done"}), "final: Input should be a valid string"),  # type: ignore[arg-type]
        (final("half \ud83d"), "surrogates not allowed"),
        ({**calls(("look", {})), "final": "done"}, "calls and a final answer at once"),
    ],
    ids=["a text", "by hand", "no text", "half a character", "both"],
)
async def test_a_decision_that_is_none_is_its_authors_mistake(
    process: Process, plan: Any, decided: Any, words: str
) -> None:
    def decide(state: State) -> dict[str, Any]:
        return {"decision": decided}

    with pytest.raises(ApplicationError, match=words) as caught:
        await process.run(plan, of(line(decide)))
    assert caught.value.non_retryable


@pytest.mark.parametrize("said", [[], [{"role": "user", "content": "please book"}]], ids=["nothing", "a user"])
async def test_only_what_the_model_said_can_end_a_run(process: Process, plan: Any, said: list[Any]) -> None:
    def forgets(state: Conversation) -> dict[str, Any]:
        return {"messages": said}

    graph = StateGraph(Conversation, context_schema=Turn)
    graph.add_node("agent", forgets)
    graph.add_node("tools", tools(then="agent"))
    graph.add_conditional_edges(START, begin_at("agent"))
    graph.add_edge("agent", "tools")
    with pytest.raises(
        ApplicationError, match="node tools needs a model's answer to decide, and 'messages' does"
    ) as caught:
        await process.run(plan, of(graph))
    assert caught.value.non_retryable


async def test_a_graph_that_goes_round_for_ever_is_stopped(process: Process, plan: Any) -> None:
    def round_(state: State) -> dict[str, Any]:
        return {}

    graph = line(round_)
    graph.add_edge("round_", "round_")
    with pytest.raises(ApplicationError, match="Recursion limit of 200") as caught:
        await process.run(plan, of(graph))
    assert caught.value.non_retryable


# ------------------------------------------------------------------ asking


async def test_no_two_questions_of_a_turn_share_a_key(process: Process, plan: Any) -> None:
    """Several in a node, in a loop, in parallel branches, in several `Send`s to one node, in a subgraph used twice."""

    async def ask(runtime: Runtime[Turn], *texts: str) -> None:
        turn = runtime.context
        await asyncio.gather(*(turn.ask([{"role": "user", "content": text}], tools=()) for text in texts))

    async def loop(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
        await ask(runtime, "a", "b")
        return {"log": ["loop"]}

    async def left(state: State, runtime: Runtime[Turn]) -> None:
        await ask(runtime, "left")

    async def right(state: State, runtime: Runtime[Turn]) -> None:
        await ask(runtime, "right")

    class Part(TypedDict):
        text: str

    async def part(state: Part, runtime: Runtime[Turn]) -> None:
        await ask(runtime, state["text"])

    async def inner(state: Part, runtime: Runtime[Turn]) -> None:
        await ask(runtime, "inner")

    def fan(state: State) -> list[Send]:
        sends = [Send("part", {"text": f"part {n}"}) for n in range(2)]
        return [*sends, Send("sub", {"text": "x"}), Send("sub", {"text": "y"})]

    def done(state: State) -> dict[str, Any]:
        return {"decision": final("done")}

    sub = StateGraph(Part, context_schema=Turn)
    sub.add_sequence([inner])
    sub.add_edge(START, "inner")
    graph = StateGraph(State, context_schema=Turn)
    for node in (loop, left, right, part, done):
        graph.add_node(node.__name__, node)
    graph.add_node("sub", sub.compile())
    graph.add_edge(START, "loop")
    graph.add_conditional_edges(
        "loop", lambda s: "loop" if len(s["log"]) < 2 else ["left", "right"], ["loop", "left", "right"]
    )
    graph.add_conditional_edges("left", fan, ["part", "sub"])
    graph.add_edge(["part", "sub"], "done")
    result = await process.run(plan, of(graph))
    assert result.final == "done"
    assert sorted(asked(process)) == ["a", "a", "b", "b", "inner", "inner", "left", "part 0", "part 1", "right"]
    assert len({key for key, _ in process.model.requests}) == 10
    assert (result.usage.calls, result.model) == (10, "fake-1")


async def test_a_node_offers_the_tools_that_it_names(process: Process, plan: Any) -> None:
    offered: list[list[str]] = []
    (model,) = process.runtime.models
    complete = model.complete

    async def spy(messages: Any, tools: Any, **more: Any) -> Any:
        offered.append([each["function"]["name"] for each in tools])
        return await complete(messages, tools, **more)

    model.complete = spy

    async def node(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
        for wanted in (None, (), ("look",)):
            await runtime.context.ask([{"role": "user", "content": "?"}], tools=wanted)
        return {"decision": final("done")}

    async def wrong(state: State, runtime: Runtime[Turn]) -> None:
        await runtime.context.ask([], tools=["nope"])

    await process.run(plan, of(line(node)))
    assert offered == [["book", "look"], [], ["look"]]
    with pytest.raises(ApplicationError, match=r"node wrong offers the tool 'nope', which agent .* does not have"):
        await process.run(plan, of(line(wrong)))


# ------------------------------------------------------------------ the loop of agent and tools


def looping(*, begin: str = "sort", then: str = "agent", messages: str = "messages") -> StateGraph[Any, Any, Any, Any]:
    """sort → agent → tools → agent → …, the agent with the tool `book` only."""

    class Sorted(Conversation):
        kind: str

    async def sort(state: Sorted, runtime: Runtime[Turn]) -> dict[str, Any]:
        answer = await runtime.context.ask([{"role": "user", "content": "which?"}], tools=())
        return {"kind": answer.text, "messages": [{"role": "user", "content": state["input"]["what"]}]}

    async def work(state: Sorted, runtime: Runtime[Turn]) -> dict[str, Any]:
        system = {"role": "system", "content": state["kind"]}
        answer = await runtime.context.ask([system, *state["messages"]], tools=("book",))
        return {"messages": [answer.message]}

    graph = StateGraph(Sorted, context_schema=Turn)
    graph.add_node("sort", sort)
    graph.add_node("agent", work)
    graph.add_node("tools", tools(then=then, messages=messages, offered=("book",)))
    graph.add_conditional_edges(START, begin_at(begin))
    graph.add_edge("sort", "agent")
    graph.add_edge("agent", "tools")
    return graph


async def test_the_next_turn_goes_on_at_the_tools_node_with_the_answers(process: Process, plan: Any) -> None:
    def script(messages: list[Any]) -> Any:
        match messages[-1]["content"]:
            case "which?":
                return say("kind")
            case "y":
                return call(("book", {"n": 1}))
            case "booked":
                return call(("look", {}))
            case error if error.startswith("error: there is no tool named 'look'; "):
                return say("done")
            case "step x has no outcome":
                return say("really done")

    process.model.script = script
    request = of(looping())
    first = await process.run(plan, request)
    assert [(each.tool, each.arguments) for each in first.calls] == [("book", {"n": 1})]
    request = after(request, first, "booked")
    second = await process.run(plan, request)
    assert second.final == "done"
    third = await process.run(plan, after(request, second, notices=["step x has no outcome"]))
    assert third.final == "really done"
    assert asked(process).count("which?") == 1
    last = process.model.requests[-1][1]
    assert [each["role"] for each in last] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert last[0]["content"] == "kind"
    assert (first.usage.calls, second.usage.calls, second.model) == (2, 2, "")


async def test_a_graph_written_for_langchain_runs_on_the_recorded_model(process: Process, plan: Any) -> None:
    class Chat(TurnState):
        messages: Annotated[list[AnyMessage], add_messages]

    async def chat(state: Chat, runtime: Runtime[Turn]) -> dict[str, Any]:
        model = runtime.context.chat_model().bind_tools([runtime.context.spec.by_name["book"]])
        messages = state["messages"] or [SystemMessage("be brief"), HumanMessage("book one")]
        return {"messages": [*messages, await model.ainvoke(messages)]}

    graph = StateGraph(Chat, context_schema=Turn)
    graph.add_node("agent", chat)
    graph.add_node("tools", tools(then="agent"))
    graph.add_conditional_edges(START, begin_at("agent"))
    graph.add_edge("agent", "tools")
    answers_ = [call(("book", '{"n": ')), call(("book", {"n": "x"})), call(("book", {"n": 1})), say("done")]
    process.model.script = lambda messages: answers_[sum(each["role"] == "assistant" for each in messages)]
    request = of(graph)
    first = await process.run(plan, request)
    assert [(each.tool, each.arguments) for each in first.calls] == [("book", {"n": 1})]
    second = await process.run(plan, after(request, first, "booked"))
    assert second.final == "done"
    roles = [each["role"] for each in process.model.requests[-1][1]]
    assert roles == ["system", "user", *["assistant", "tool"] * 3]
    assert first.usage.calls == 3


async def test_branches_that_call_tools_decide_together_and_hear_their_own(process: Process, plan: Any) -> None:
    class Two(TurnState):
        left: Annotated[list[dict[str, Any]], operator.add]
        right: Annotated[list[dict[str, Any]], operator.add]

    def side(name: str) -> Any:
        async def node(state: Any, runtime: Runtime[Turn]) -> dict[str, Any]:
            opening = [] if state[name] else [{"role": "user", "content": name}]
            answer = await runtime.context.ask([*state[name], *opening])
            return {name: [*opening, answer.message]}

        return node

    def join(state: Two) -> dict[str, Any]:
        return {"decision": calls(*((each.tool, each.arguments) for each in answers(state)))}

    graph = StateGraph(Two, context_schema=Turn)
    for name in ("left", "right"):
        graph.add_node(name, side(name))
        graph.add_node(f"{name}_tools", tools(then=name, messages=name))
        graph.add_edge(name, f"{name}_tools")
    graph.add_node("begin", lambda state: {})
    graph.add_edge("begin", "left")
    graph.add_edge("begin", "right")
    graph.add_conditional_edges(START, begin_at("begin"))
    heard: dict[str, str] = {}

    def script(messages: list[Any]) -> Any:
        if messages[-1]["role"] == "tool":
            heard[messages[0]["content"]] = messages[-1]["content"]
            return call(("look", {"n": 3}))
        return call(("book", {"n": 1 if messages[0]["content"] == "left" else 2}))

    process.model.script = script
    request = of(graph)
    first = await process.run(plan, request)
    assert [each.arguments for each in first.calls] == [{"n": 1}, {"n": 2}]
    second = await process.run(plan, after(request, first, "for left", "for right"))
    assert heard == {"left": "for left", "right": "for right"}
    assert [each.tool for each in second.calls] == ["look", "look"]


# ------------------------------------------------------------------ mistakes seen when the graph is loaded


def test_a_graph_that_could_not_run_is_refused_where_it_is_loaded() -> None:
    class Bare(TypedDict):
        text: str

    with pytest.raises(TypeError, match="not compiled; it is CompiledStateGraph"):
        check(looping().compile(), "a")
    with pytest.raises(TypeError, match="a TypedDict that extends TurnState; it lacks answers, decision"):
        check(_bare(Bare), "a")
    edged = looping()
    edged.add_edge("tools", "agent")
    with pytest.raises(TypeError, match=r"node tools chooses the next node itself.* remove its edge to agent"):
        check(edged, "a")
    straight = StateGraph(Conversation)
    straight.add_node("tools", tools(then="tools"))
    straight.add_edge(START, "tools")
    with pytest.raises(TypeError, match="a turn goes on at node tools, so its graph has to begin with add_conditional"):
        check(straight, "a")
    with pytest.raises(TypeError, match="agent a: its graph begins at 'agnet', and there is no such node"):
        check(looping(begin="agnet"), "a")
    with pytest.raises(TypeError, match="agent a: node tools goes on at 'agnet', and there is no such node"):
        check(looping(then="agnet"), "a")
    with pytest.raises(TypeError, match="agent a: node tools reads the messages at 'left', which no state has"):
        check(looping(messages="left"), "a")


def _bare(schema: Any) -> StateGraph[Any, Any, Any, Any]:
    graph = StateGraph(schema)
    graph.add_node("only", lambda state: {})
    graph.add_edge(START, "only")
    graph.add_edge("only", END)
    return graph
