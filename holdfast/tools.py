"""Tools: plain typed functions, declared once with what the platform must know to run them safely.

    @tool(effect=Effect.IDEMPOTENT, service="pharmacy", retries=0)
    async def order_medication(ctx: ToolContext, patient_id: str, items: list[Item]) -> Order:
        \"\"\"Order discharge medication.\"\"\"

    @order_medication.undo
    async def cancel_order(ctx: ToolContext, undo: Undo) -> str: ...

The first parameter is the context; the others, with their annotations, are the arguments that the model fills in.
Async functions run on the loop, sync ones in a thread, so neither blocks the worker.

A tool may name what stands in for it when it is exhausted, or while its service's breaker is open: other tools, the
last good result (`fallback=(phone_booking, LastGood(timedelta(hours=6)))`), at last a template (`@summary.template`).
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic_core import to_jsonable_python

from holdfast import outside
from holdfast.contracts import Effect, Json, ToolPolicy
from holdfast.services import check_bound

if TYPE_CHECKING:
    import httpx2

    from holdfast.answers import ModelAnswer
    from holdfast.mcp.hub import Hub
    from holdfast.options import ModelOptions


LONGEST_PAUSE_S = 366 * 86_400
"""Between two questions how far a job is."""


class ToolRefused(Exception):
    """Raised by a tool for the caller's own mistake. The text goes to the model, nothing is retried."""


class ToolFailed(Exception):
    """Raised by a tool that certainly did nothing and never will. Not retried."""


def as_position(value: Any) -> Any:
    """A position as plain JSON data. Raises ValueError for what cannot be kept, which is a bug of the tool."""
    try:
        return json.loads(json.dumps(to_jsonable_python(value), allow_nan=False))
    except ValueError as error:
        raise ValueError(f"a position has to be JSON data: {error}") from None


class NotReady(Exception):
    """Raised by a tool that has begun something and asks how far it is: `raise NotReady("job 17 is at 40 %")`.

    No failure: the tool is called again, with the position that it told, until it returns or its deadline passes.
    """

    def __init__(self, why: str, *, after: float | None = None, position: Any = None) -> None:
        """after: seconds until then; None: 1 s, doubled to a minute. position: JSON data, else as told to `advance`.

        Raises ValueError for seconds or a position that are none.
        """
        if after is not None and not 0 <= after <= LONGEST_PAUSE_S:
            raise ValueError(f"NotReady(after={after}): expected seconds from now, at most {LONGEST_PAUSE_S}")
        super().__init__(why)
        self.why = why
        self.after = after
        self.position = as_position(position)


@dataclass(frozen=True)
class Undo:
    """What a compensation gets. `result` is None for an unknown outcome: ask by `key`, cope with 'never happened'."""

    key: str
    """The `ctx.key` that the call had which is to be undone."""
    arguments: Mapping[str, Any]
    result: Any | None


class AskModel(Protocol):
    """A model call of a tool's own: a label, messages, and how it is asked; by default as the agent's model is."""

    def __call__(
        self, label: str, messages: list[Json], options: ModelOptions | None = None, /
    ) -> Awaitable[ModelAnswer]: ...


@dataclass(frozen=True)
class ToolContext:
    """What a tool call may use."""

    key: str
    """Idempotency key, the same over retries, crashes and resets. Hand it downstream; it fits a header (`keys`)."""
    attempt: int
    http: httpx2.AsyncClient
    """A shared client, which keeps no cookies. Its timeout is the tool's own, enforced around the call."""
    service_url: Callable[[str], str]
    """Base address of a named service."""
    ask_model: AskModel
    """`await ctx.ask_model("summary", messages)`: a model call of the tool's own, recorded under `key/summary`.

    With `ModelOptions(schema=Terms.model_json_schema())` as a third argument the request names the JSON wanted.
    An answer that was cut at its limit never comes back: it is asked for again, three times at most.
    Ask before the effect, never after: a model that is gone makes the tool begin again.
    """
    make_workspace: Callable[[], Path] = Path.cwd
    position: Any = None
    """Where an earlier attempt of a long call got to, as it told `advance` or `NotReady`; None when none did."""
    advance: Callable[[Any], None] = lambda position: None
    """`ctx.advance(position)`: JSON data that the next attempt gets as `position`, should this one die."""
    mcp: Hub | None = None
    """The MCP servers of this process."""

    @property
    def workspace(self) -> Path:
        """A folder of this agent's under `HOLDFAST_HOME`. Workers on several machines need a disk in common for it."""
        return self.make_workspace()


@dataclass(frozen=True)
class LastGood:
    """A fallback of a read: its last good result for the same arguments, when that is not older than `max_age`."""

    max_age: timedelta


@dataclass
class Tool:
    """A declared tool. Made by `@tool`, never by hand."""

    name: str
    description: str
    version: str
    effect: Effect
    service: str
    timeout_s: float
    deadline_s: float
    retries: int
    approval: bool
    function: Callable[..., Any]
    arguments: type[BaseModel]
    result_schema: Json
    per_minute: int | None = None
    queue: str = ""
    put_off: bool = True
    role: str = ""
    settles_s: float | None = None
    fallback: tuple[Tool | LastGood, ...] = ()
    undo_function: Callable[..., Any] | None = None
    probe_function: Callable[..., Any] | None = None
    template_function: Callable[..., Any] | None = None
    _openai: Json | None = field(default=None, repr=False)

    def undo(self, function: Callable[[ToolContext, Undo], Any]) -> Callable[[ToolContext, Undo], Any]:
        """Declares the compensation: `(ctx, undo)` says in words what it did, or None when the effect never happened.

        It has to be idempotent.
        """
        if self.effect is Effect.READ:
            raise TypeError(f"tool {self.name}: a read has nothing to undo")
        self.undo_function = function
        return function

    def probe(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Declares the probe: `(ctx, **arguments)` asks by `ctx.key`; the result, or None if it did not happen so far.

        None counts once the request is older than `settles_within`; without that bound a person settles the call.
        """
        if self.effect is not Effect.PROBE:
            raise TypeError(f"tool {self.name}: only a tool of effect class `probe` has a probe")
        self.probe_function = function
        return function

    def template(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Declares the last fallback: `(ctx, **arguments)` makes the result from the arguments alone."""
        if self.effect is not Effect.READ:
            raise TypeError(f"tool {self.name}: a template changes nothing, so it cannot stand in for an effect")
        self.template_function = function
        return function

    def check(self) -> None:
        """Raises TypeError when the declaration is incomplete. Called for every tool of an agent at start."""
        for other in self.fallback:
            if isinstance(other, LastGood):
                if self.effect is not Effect.READ:
                    raise TypeError(f"tool {self.name}: a last good result cannot stand in for an effect")
            elif missing := set(other.arguments.model_fields) ^ set(self.arguments.model_fields):
                raise TypeError(
                    f"tool {self.name}: its fallback {other.name} has to take the same arguments; they differ in"
                    f" {', '.join(sorted(missing))}"
                )
            elif other.fallback or other.template_function:
                raise TypeError(f"tool {self.name}: its fallback {other.name} has fallbacks of its own; name them here")
            else:
                other.check()
        if self.effect is Effect.PROBE and self.probe_function is None:
            raise TypeError(f"tool {self.name}: effect class `probe` needs a probe; add one with @{self.name}.probe")

    def validate(self, arguments: Any) -> Json:
        """The arguments as plain JSON data with defaults filled in. Raises pydantic's ValidationError."""
        return self.arguments.model_validate(arguments).model_dump(mode="json")

    @property
    def policy(self) -> ToolPolicy:
        """What the workflow has to know."""
        return ToolPolicy(
            effect=self.effect,
            service=self.service,
            approval=self.approval,
            undo=any(each.undo_function for each in self.chain),
            timeout_s=self.timeout_s,
            deadline_s=self.deadline_s,
            queue=self.queue,
            put_off=self.put_off,
            role=self.role,
            pure=all(each.pure for each in self.chain),
        )

    @property
    def pure(self) -> bool:
        """It changes nothing outside: it reads, or is declared as asking nothing but a model."""
        asks = self.effect is Effect.IDEMPOTENT and self.service == "model" and self.undo_function is None
        return self.effect is Effect.READ or asks

    @property
    def chain(self) -> list[Tool]:
        """The tool and the tools that may stand in for it, in their order."""
        return [self, *(other for other in self.fallback if isinstance(other, Tool))]

    @property
    def has_fallback(self) -> bool:
        return bool(self.fallback or self.template_function)

    @property
    def schema(self) -> Json:
        """JSON schema of the arguments."""
        schema = self.arguments.model_json_schema()
        schema.pop("title", None)
        return schema

    @property
    def openai(self) -> Json:
        """The tool as an entry of `tools` in a chat completion request."""
        if self._openai is None:
            spec = {"name": self.name, "description": self.description, "parameters": self.schema}
            self._openai = {"type": "function", "function": spec}
        return self._openai

    async def call(self, ctx: ToolContext, arguments: Json) -> Any:
        """Runs the tool; the result as plain JSON data."""
        return await _run(self.function, ctx, **self._typed(arguments))

    async def run_probe(self, ctx: ToolContext, arguments: Json) -> Any | None:
        """Asks whether the call happened: its result, or None."""
        assert self.probe_function is not None
        return await _run(self.probe_function, ctx, **self._typed(arguments))

    async def run_template(self, ctx: ToolContext, arguments: Json) -> Any:
        assert self.template_function is not None
        return await _run(self.template_function, ctx, **self._typed(arguments))

    async def run_undo(self, ctx: ToolContext, undo: Undo) -> str | None:
        """What was done in words; None when there was nothing to undo."""
        assert self.undo_function is not None
        return await _run(self.undo_function, ctx, undo)

    def _typed(self, arguments: Json) -> dict[str, Any]:
        model = self.arguments.model_validate(arguments)
        return {name: getattr(model, name) for name in type(model).model_fields}


_THREADS = ThreadPoolExecutor(400, "tool")
"""For sync tools, as many as a worker has activities, its stages' too: one that hangs must not keep another from
starting."""


async def _run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if inspect.iscoroutinefunction(function):
        result = await function(*args, **kwargs)
    else:
        call = partial(copy_context().run, function, *args, **kwargs)
        result = await asyncio.get_running_loop().run_in_executor(_THREADS, call)
    return _plain(result)


def _plain(result: Any) -> Any:
    """A result as JSON data that can be kept. The call has happened: what cannot be kept of it is cut, and says so."""
    try:
        plain = to_jsonable_python(result)
    except (ValueError, RecursionError):  # too deep for that
        plain = to_jsonable_python(outside.fitting(result))
    return outside.fitting(plain)


def tool(
    *,
    effect: Effect,
    service: str,
    version: str = "1",
    timeout: float = 10.0,
    deadline: float = 3600.0,
    retries: int = 5,
    approval: bool = False,
    role: str = "",
    per_minute: int | None = None,
    queue: str = "",
    put_off: bool = True,
    settles_within: float | None = None,
    fallback: tuple[Tool | LastGood, ...] = (),
    name: str = "",
    arguments: type[BaseModel] | None = None,
) -> Callable[[Callable[..., Any]], Tool]:
    """Declares a tool.

    effect: what a crash in the middle means; required.
    service: the external service it talks to, as breakers and limits count it. "model" for a tool that does nothing
    outside but ask a model (and keep what it said): cut off at any moment, its call is a failure and never in doubt.
    timeout: seconds for one attempt. deadline: seconds over all attempts. retries: real failures after the first try.
    approval: a human has to say yes before each call. role: who is asked; without it the role of the tool's step.
    per_minute: calls that all workers together may make in a minute, per tenant.
    queue: the stage whose workers run it (`worker.py --queue`), so that stages scale apart; none: the main ones.
    put_off: False for a tool that the rest of the work needs: while its service or its model is gone the turn waits for
    the call, and the tool is not withdrawn from what the model is offered.
    settles_within: seconds after which a request that had no effect never has one, counted from the end of the attempt
    that sent it; None: as its service declares. Until then a `probe`'s "no" does not count, and an unknown outcome is
    not undone. Where neither declares it, a person settles what the probe says did not happen.
    fallback: what stands in for the tool, in this order.
    arguments: their schema, for a function that takes them as `**arguments`; by default read from its signature.
    Raises TypeError at import for a declaration that could not run safely.
    """

    def declare(function: Callable[..., Any]) -> Tool:
        label = name or function.__name__
        if queue and not re.fullmatch(r"(?!main$)[a-z][a-z0-9-]{0,30}", queue):
            raise TypeError(f"tool {label}: queue {queue!r} has to be a word such as 'extract', and not 'main'")
        if role and not approval:
            raise TypeError(f"tool {label}: role {role!r} is who approves its calls, so it needs approval=True")
        check_bound(f"tool {label}", settles_within)
        if settles_within is not None and effect is Effect.READ:
            raise TypeError(f"tool {label}: a read has no effect, so it takes no settles_within")
        description = inspect.getdoc(function)
        if not description:
            raise TypeError(f"tool {label}: needs a docstring, it is what the model reads")
        if effect in (Effect.PROBE, Effect.MANUAL) and not inspect.iscoroutinefunction(function):
            # A thread goes on after its timeout and could still act when another attempt, or the undo, already has.
            raise TypeError(
                f"tool {label}: of effect class {effect}, so it has to be async: a thread cannot be stopped"
            )
        hints = get_type_hints(function, include_extras=True)
        return Tool(
            name=label,
            description=description,
            version=version,
            effect=Effect(effect),
            service=service,
            timeout_s=timeout,
            deadline_s=deadline,
            retries=retries,
            approval=approval,
            per_minute=per_minute,
            queue=queue,
            put_off=put_off,
            role=role,
            settles_s=settles_within,
            fallback=tuple(fallback),
            function=function,
            arguments=arguments or _arguments(label, function, hints),
            result_schema=TypeAdapter(hints.get("return", Any)).json_schema(),
        )

    return declare


def _arguments(label: str, function: Callable[..., Any], hints: dict[str, Any]) -> type[BaseModel]:
    """The arguments by the function's signature, without the context."""
    fields: dict[str, Any] = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.name not in hints:
            raise TypeError(f"tool {label}: argument {parameter.name} needs a type")
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    return create_model(f"{label}_arguments", __config__=ConfigDict(extra="forbid"), **fields)


def explain(error: ValidationError) -> str:
    """A validation error in lines that a model or a person can act on."""
    lines = (f"{'.'.join(str(p) for p in e['loc']) or 'arguments'}: {e['msg']}" for e in error.errors())
    return "; ".join(lines)
