"""Tools: typed functions, declared with what the platform must know to run them safely.

    @tool(effect=Effect.IDEMPOTENT, service="pharmacy", retries=0)
    async def order_medication(ctx: ToolContext, patient_id: str, items: list[Item]) -> Order:
        \"\"\"Order discharge medication.\"\"\"

    @order_medication.undo
    async def cancel_order(ctx: ToolContext, undo: Undo) -> str: ...

The first parameter is the context. The others, with their annotations, are the arguments that the model fills in.
Async functions run on the event loop, sync functions in a thread, so neither blocks the worker.

A tool may declare fallbacks, which answer when its retries are used up or while its service's circuit breaker is open:
other tools, the last good result (`fallback=(phone_booking, LastGood(timedelta(hours=6)))`), and finally a template
(`@summary.template`).
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

from pydantic import BaseModel, ConfigDict, TypeAdapter, create_model
from pydantic_core import to_jsonable_python

from holdfast.authoring.options import ModelAnswer, ModelOptions
from holdfast.authoring.services import check_bound
from holdfast.contracts import outside
from holdfast.contracts.data import Json
from holdfast.contracts.profile import Effect, ToolPolicy

if TYPE_CHECKING:
    import httpx2


LONGEST_PAUSE_S = 366 * 86_400
"""Longest time between two polls of a job."""


def as_position(value: Any) -> Any:
    """Returns a position as plain JSON data. Raises ValueError when it cannot be stored, which is a bug of the tool."""
    try:
        return json.loads(json.dumps(to_jsonable_python(value), allow_nan=False))
    except ValueError as error:
        raise ValueError(f"a position has to be JSON data: {error}") from None


class NotReady(Exception):
    """Raised by a tool whose job is not finished, so that it polls again later: `raise NotReady("job 17 is at 40 %")`.

    It is not a failure: the platform calls the tool again with its last position, until the tool returns or its
    deadline passes.
    """

    def __init__(self, why: str, *, after: float | None = None, position: Any = None) -> None:
        """after: seconds until the next call; None: 1 s, doubled each time up to a minute.
        position: JSON data for the next call; None: the last one given to `advance`.

        Raises ValueError for seconds out of range, and for a position that is not JSON data.
        """
        if after is not None and not 0 <= after <= LONGEST_PAUSE_S:
            raise ValueError(f"NotReady(after={after}): expected seconds from now, at most {LONGEST_PAUSE_S}")
        super().__init__(why)
        self.why = why
        self.after = after
        self.position = as_position(position)


@dataclass(frozen=True)
class Undo:
    """Input of a compensation.

    `result` is None for an unknown outcome: the compensation asks the service by `key`, and must handle an effect that
    never happened.
    """

    key: str
    """The `ctx.key` of the call to undo."""
    arguments: Mapping[str, Any]
    result: Any | None


class Servers(Protocol):
    """Connections to the servers of remote tools, by server."""

    def connection(self, server: Any, /) -> Any: ...


class AskModel(Protocol):
    """Makes a tool's own model call, with a label, messages and options; by default the agent's model options."""

    def __call__(
        self, label: str, messages: list[Json], options: ModelOptions | None = None, /
    ) -> Awaitable[ModelAnswer]: ...


@dataclass(frozen=True)
class ToolContext:
    """What a tool call may use."""

    key: str
    """Idempotency key, the same across retries, crashes and Resets. Send it to the service; it fits into a header
    (`keys`)."""
    attempt: int
    http: httpx2.AsyncClient
    """A shared client without cookies. The platform enforces the tool's timeout around the call."""
    service_url: Callable[[str], str]
    """Returns the base address of a service by its name."""
    ask_model: AskModel
    """`await ctx.ask_model("summary", messages)`: a model call of the tool's own, recorded under `key/summary`.

    With `ModelOptions(schema=Terms.model_json_schema())` as a third argument, the request asks for JSON of this schema.
    The call never returns an answer that was cut at its limit: it asks again, three times at most.
    Ask the model before the effect, never after it: when the model is unavailable, the tool starts again.
    """
    make_workspace: Callable[[], Path] = Path.cwd
    position: Any = None
    """The last position that an earlier attempt gave to `advance` or `NotReady`; None when there is none."""
    advance: Callable[[Any], None] = lambda position: None
    """`ctx.advance(position)`: JSON data that the next attempt gets as `position` when this one dies."""
    servers: Servers | None = None
    """This process's connections to the servers of remote tools."""

    @property
    def workspace(self) -> Path:
        """This agent's folder under `HOLDFAST_HOME`. Workers on several machines need it on a shared disk."""
        return self.make_workspace()


@dataclass(frozen=True)
class LastGood:
    """A fallback of a read: its last good result for the same arguments, at most `max_age` old."""

    max_age: timedelta


@dataclass
class Tool:
    """A declared tool. Create it with `@tool` only."""

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
    deferrable: bool = True
    role: str = ""
    settles_s: float | None = None
    remote: bool = False
    """A tool of an MCP server, which has its schema and runs it."""
    fallback: tuple[Tool | LastGood, ...] = ()
    undo_function: Callable[..., Any] | None = None
    probe_function: Callable[..., Any] | None = None
    template_function: Callable[..., Any] | None = None
    _openai: Json | None = field(default=None, repr=False)

    def undo(self, function: Callable[[ToolContext, Undo], Any]) -> Callable[[ToolContext, Undo], Any]:
        """Declares the compensation: `(ctx, undo)` returns a text that says what it did, or None when the effect never
        happened. It must be idempotent.
        """
        if self.effect is Effect.READ:
            raise TypeError(f"tool {self.name}: a read has nothing to undo")
        self.undo_function = function
        return function

    def probe(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Declares the probe: `(ctx, **arguments)` asks the service by `ctx.key` whether the call happened.

        It returns the call's result, or None when the call has not happened so far. None counts once the request is
        older than `settles_within`; without that bound a person settles the call.
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
        """Raises TypeError when the declaration is incomplete. `AgentSpec` calls it for each of its tools."""
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
        """Returns the arguments as plain JSON data, with defaults filled in. Raises pydantic's ValidationError."""
        return self.arguments.model_validate(arguments).model_dump(mode="json")

    @property
    def policy(self) -> ToolPolicy:
        """The rules that the workflow needs."""
        return ToolPolicy(
            effect=self.effect,
            service=self.service,
            approval=self.approval,
            undo=any(each.undo_function for each in self.chain),
            timeout_s=self.timeout_s,
            deadline_s=self.deadline_s,
            queue=self.queue,
            deferrable=self.deferrable,
            role=self.role,
            pure=all(each.pure for each in self.chain),
        )

    @property
    def pure(self) -> bool:
        """Whether it changes nothing outside: it only reads, or its declaration says that it only asks a model."""
        asks = self.effect is Effect.IDEMPOTENT and self.service == "model" and self.undo_function is None
        return self.effect is Effect.READ or asks

    @property
    def chain(self) -> list[Tool]:
        """The tool and its fallback tools, in order."""
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
        """Runs the tool and returns its result as plain JSON data."""
        return await _run(self.function, ctx, **self._typed(arguments))

    async def run_probe(self, ctx: ToolContext, arguments: Json) -> Any | None:
        """Asks the service whether the call happened, and returns the call's result or None."""
        assert self.probe_function is not None
        return await _run(self.probe_function, ctx, **self._typed(arguments))

    async def run_template(self, ctx: ToolContext, arguments: Json) -> Any:
        assert self.template_function is not None
        return await _run(self.template_function, ctx, **self._typed(arguments))

    async def run_undo(self, ctx: ToolContext, undo: Undo) -> str | None:
        """Runs the compensation and returns a text that says what it did; None when there was nothing to undo."""
        assert self.undo_function is not None
        return await _run(self.undo_function, ctx, undo)

    def _typed(self, arguments: Json) -> dict[str, Any]:
        model = self.arguments.model_validate(arguments)
        return {name: getattr(model, name) for name in type(model).model_fields}


_THREADS = ThreadPoolExecutor(400, "tool")
"""Runs sync tools. As many threads as a worker runs activities, those of its stages included: a tool that hangs must
not keep another from starting."""


async def _run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if inspect.iscoroutinefunction(function):
        result = await function(*args, **kwargs)
    else:
        call = partial(copy_context().run, function, *args, **kwargs)
        result = await asyncio.get_running_loop().run_in_executor(_THREADS, call)
    return _plain(result)


def _plain(result: Any) -> Any:
    """Returns a result as JSON data that can be stored. The call has happened, so what cannot be stored is cut out and
    marked, never refused."""
    try:
        plain = to_jsonable_python(result)
    except (ValueError, RecursionError):  # nested too deep
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
    deferrable: bool = True,
    settles_within: float | None = None,
    fallback: tuple[Tool | LastGood, ...] = (),
    name: str = "",
    arguments: type[BaseModel] | None = None,
) -> Callable[[Callable[..., Any]], Tool]:
    """Declares a tool.

    effect: what an interrupted call may have left behind; required.
    service: the external service that it calls, for circuit breakers and rate limits. "model" for a tool that only asks
    a model (and stores its answer): such a call that is interrupted has failed, its outcome is never unknown.
    timeout: seconds for one attempt. deadline: seconds for all attempts. retries: real failures after the first one.
    approval: a person must approve each call. role: who is asked; by default the role of the tool's step.
    per_minute: rate limit of the tool: calls of all workers together per minute, per tenant.
    queue: the stage whose workers run it (`worker.py --queue`), so that stages scale separately; by default the main
    workers.
    deferrable: False for a tool that the rest of the work needs: while its service or its model is unavailable, the
    turn waits for the call (parked), and the model is still offered the tool. True: such a call is deferred.
    settles_within: seconds after which a request that has had no effect will never have one, counted from the end of
    the attempt that sent it; None: the value of its service. Until then a probe's "no" does not count, and an unknown
    outcome is not undone. When neither declares it and the probe says that a call did not happen, a person settles it.
    fallback: the tool's fallbacks, in order.
    arguments: their schema, for a function that takes `**arguments`; by default read from its signature.
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
            # A thread keeps running after its timeout, and could act after another attempt or the undo has acted.
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
            deferrable=deferrable,
            role=role,
            settles_s=settles_within,
            fallback=tuple(fallback),
            function=function,
            arguments=arguments or _arguments(label, function, hints),
            result_schema=TypeAdapter(hints.get("return", Any)).json_schema(),
        )

    return declare


def _arguments(label: str, function: Callable[..., Any], hints: dict[str, Any]) -> type[BaseModel]:
    """Builds the arguments' model from the function's signature, without the context."""
    fields: dict[str, Any] = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.name not in hints:
            raise TypeError(f"tool {label}: argument {parameter.name} needs a type")
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    return create_model(f"{label}_arguments", __config__=ConfigDict(extra="forbid"), **fields)
