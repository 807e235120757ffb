"""`starter.py doctor`: checks what runs need and says how to fix what is missing."""

from __future__ import annotations

import asyncio
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from secrets import token_hex

import httpx2
from rich.table import Table
from rich.text import Text
from temporalio.api.common.v1 import Payload
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest, GetSystemInfoRequest
from temporalio.converter import StorageDriverRetrieveContext, StorageDriverStoreContext
from temporalio.service import RPCError, RPCStatusCode

from holdfast.authoring import places, registry
from holdfast.cli.output import counted, out, print_json
from holdfast.cli.up import running_stack
from holdfast.contracts.data import Json
from holdfast.engine.client import (
    OPERATORS_ONLY,
    Client,
    NoServer,
    connect,
    data_converter,
    missing_search_attributes,
    profile,
    register_search_attributes,
)
from holdfast.engine.deployments import DeploymentError, describe, takes_new_runs, without_versions
from holdfast.engine.payload_storage import close
from holdfast.reasoning.answers import ModelUnavailable
from holdfast.reasoning.model_client import ModelClient
from holdfast.recovery.orphans import is_scheduled, schedule
from holdfast.setting_formats import parse_keys
from holdfast.settings import ModelTarget, settings, stack_file, temporal_profile
from holdfast.state.database import StoreUnavailable, one_line
from holdfast.state.opening import open_database
from holdfast.state.version import SchemaMismatch, check_schema


@dataclass
class Check:
    """One finding. `needed`: without it no run can end."""

    what: str
    ok: bool
    found: str
    to_do: str = ""
    needed: bool = True


BROUGHT = {
    "Temporal server": ("TEMPORAL_ADDRESS",),
    "large payloads": ("HOLDFAST_PAYLOAD_STORE", "DATABASE_URL"),
    "store": ("DATABASE_URL",),
    "model": ("OPENAI_BASE_URL", "OPENAI_API_KEY"),
    "hospital (simulated)": ("HOLDFAST_HOSPITAL_URL",),
}
"""What the embedded stack provides, and the variables that name another one instead."""


async def doctor(fix: bool, as_json: bool) -> int:
    checks = [_versions(), _agents(), _stack()]
    try:
        client = await connect()
    except NoServer as error:
        checks.append(Check("Temporal server", False, str(error), "start it, or set TEMPORAL_ADDRESS"))
    else:
        checks += await _temporal(client, fix)
    checks += [_encryption(), await _payload_store(), await _store(), model := await _model()]
    checks += [*(await _tools() if model.ok else ()), await _hospital()]
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for check in _told_once(checks):
            mark = Text("✓", "green") if check.ok else Text("✗", "red") if check.needed else Text("·", "dim")
            words = check.found + (f"\n→ {check.to_do}" if check.to_do and not check.ok else "")
            table.add_row(mark, check.what, Text(words))
        out.print(table)
    return 0 if all(check.ok for check in checks if check.needed) else 1


def _told_once(checks: list[Check]) -> list[Check]:
    """The checks for display. When no stack runs, all that is missing for that reason becomes one finding."""
    failed = {check.what for check in checks if not check.ok}
    if not {"embedded stack", "Temporal server"} <= failed or temporal_profile().address:
        return checks
    follow = [what for what, variables in BROUGHT.items() if what in failed and not {*variables} & {*os.environ}]
    nothing = Check("embedded stack", False, f"nothing runs here: no {', '.join(follow)}", "uv run starter.py up")
    return [nothing if each.what == "embedded stack" else each for each in checks if each.what not in follow]


def _versions() -> Check:
    packages = ", ".join(f"{name} {version(name)}" for name in ("temporalio", "langgraph", "openai", "pydantic"))
    return Check("versions", True, f"Python {platform.python_version()}, {packages}")


def _agents() -> Check:
    """Checks that agents are where the settings say, and that none is broken."""
    if wrong := places.missing_folders():
        return Check("agents", False, "; ".join(wrong), "workers do not start before HOLDFAST_AGENTS is right")
    found = f"{counted(len(registry.agents()), 'agent')} in {', '.join(map(_name_of, places.places().there))}"
    broken = "; ".join(map(str, registry.broken().values()))
    return Check("agents", not broken, broken or found, "correct them; the other agents go on", needed=False)


def _name_of(place: places.Place) -> str:
    return "agents/" if place == places.SHIPPED else str(place.folder)


def _stack() -> Check:
    home = stack_file().parent
    process = running_stack(home) if home.exists() else None
    if process is not None:
        return Check("embedded stack", True, f"runs (process {process}, state in {home})", needed=False)
    stale = "; stack.json is left over from one that was killed" if stack_file().exists() else ""
    return Check("embedded stack", False, f"does not run{stale}", "uv run starter.py up", needed=False)


async def _temporal(client: Client, fix: bool) -> list[Check]:
    where = client.service_client.config.target_host
    system = await client.workflow_service.get_system_info(GetSystemInfoRequest())
    checks = [Check("Temporal server", True, f"{where}, version {system.server_version}")]
    try:
        await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=client.namespace))
    except RPCError as error:
        to_do = "set TEMPORAL_NAMESPACE to the right namespace, or use a key or certificate for this one"
        if error.status is RPCStatusCode.NOT_FOUND:
            to_do = f"set TEMPORAL_NAMESPACE, or: temporal operator namespace create --namespace {client.namespace}"
        return [*checks, Check("namespace", False, f"{client.namespace}: {error.message}", to_do)]
    checks.append(Check("namespace", True, client.namespace))
    try:
        registered = await register_search_attributes(client) if fix else []
        missing = await missing_search_attributes(client)
    except RPCError as error:
        if error.status not in OPERATORS_ONLY:
            raise
        # Temporal Cloud has its own interface for search attributes; its operator service refuses this.
        registered, missing = [], await missing_search_attributes(client)
    done = f"registered now: {', '.join(registered)}" if registered else "all there"
    lacking = f"missing: {', '.join(missing)}"
    fixing = "uv run starter.py doctor --fix"
    if missing and fix:
        each = " ".join(f"--search-attribute {name}=Keyword" for name in missing)
        fixing = (
            "the server does not let you register them. Temporal Cloud: "
            f"tcld namespace search-attributes add --namespace {client.namespace} {each}, or in its Web UI; "
            "elsewhere ask the server's operator"
        )
    checks.append(Check("search attributes", not missing, lacking if missing else done, fixing))
    return [*checks, await _sweep(client, fix), *await _builds(client)]


async def _builds(client: Client) -> list[Check]:
    """Checks that each build of versioned workers that has open runs also has workers."""
    name = settings().deployment
    try:
        if not name:
            return await _versioned_elsewhere(client, settings().task_queue)
        deployment = await describe(client, name)
    except (DeploymentError, RPCError) as error:
        return [Check("deployment", False, str(error), "to start versioned workers see docs/how-to/deployment.md")]
    found = ", ".join(f"{each.build} {each.state} ({each.open_runs} runs open)" for each in deployment.builds)
    return [Check("deployment", not deployment.troubles, f"{name}: {found}", "; ".join(deployment.troubles))]


async def _versioned_elsewhere(client: Client, queue: str) -> list[Check]:
    """Checks whether unversioned workers would get no runs, because all new runs go to a versioned build."""
    name, build = await takes_new_runs(client, queue)
    if not name:
        return []
    found = f"new runs of task queue {queue} go to build {build} of {name}; workers without a version get none"
    to_do = f"set HOLDFAST_DEPLOYMENT={name} here and for the workers; or, to go back: {without_versions(name)}"
    return [Check("deployment", False, found, to_do, needed=False)]


async def _sweep(client: Client, fix: bool) -> Check:
    try:
        made = await schedule(client, settings().task_queue) if fix else False
        there = made or await is_scheduled(client)
    except RPCError as error:
        return Check("orphan sweep", False, error.message, "ask the server's operator to allow schedules", needed=False)
    found = "scheduled now" if made else "scheduled"
    to_do = "uv run starter.py doctor --fix: without the sweep, the effects of terminated runs are not undone"
    return Check("orphan sweep", there, found if there else "not scheduled", to_do, needed=False)


def _encryption() -> Check:
    keys = list(parse_keys(settings().encryption_keys.get_secret_value()))
    if not keys and (lacking := settings().kept_by_the_stack("HOLDFAST_ENCRYPTION_KEYS")):
        return Check("encryption", False, "the stack encrypts, and there is no key here", lacking)
    if not keys:
        to_do = "set HOLDFAST_ENCRYPTION_KEYS to encrypt what runs keep in Temporal's database"
        return Check("encryption", False, "off: payloads are in clear text", to_do, needed=False)
    older = f"; also decrypts: {', '.join(keys[1:])}" if keys[1:] else ""
    return Check("encryption", True, f"on, with key {keys[0]}{older}", needed=False)


async def _payload_store() -> Check:
    """Checks payload storage by storing and reading a small payload."""
    limit, where = settings().payload_limit, settings().payload_store
    what = "large payloads"
    converter = data_converter(settings(), profile().namespace or "default")
    assert converter.external_storage
    driver = converter.external_storage.drivers[0]
    probe = Payload(metadata={"encoding": b"binary/plain"}, data=b"holdfast doctor")
    try:
        async with asyncio.timeout(10):
            claims = await driver.store(StorageDriverStoreContext(), [probe])
            same = await driver.retrieve(StorageDriverRetrieveContext(), claims) == [probe]
    except TimeoutError:
        return Check(what, False, f"{where} does not answer within 10 s", "check HOLDFAST_PAYLOAD_STORE")
    except Exception as error:  # noqa: BLE001 - errors of five libraries; the check shows them
        words = one_line(error.__cause__ or error) or type(error).__name__
        to_do = "check HOLDFAST_PAYLOAD_STORE, and the store check below"
        return Check(what, False, f"{where} does not take them: {words}", to_do)
    finally:
        await close(converter.external_storage)
    found = f"over {limit:,} bytes: to {where}" + ("" if same else ", which returned other data")
    return Check(what, same, found, "check for a proxy or cache between this machine and that store")


async def _store() -> Check:
    kind = "Postgres (DATABASE_URL)" if settings().store_url.startswith("postgres") else settings().store_url
    try:
        database = await open_database(settings().store_url)
    except StoreUnavailable as error:
        to_do = settings().kept_by_the_stack("DATABASE_URL")
        return Check(
            "store", False, str(error), to_do or "uv run starter.py migrate (with DATABASE_URL set, for Postgres)"
        )
    try:
        await check_schema(database)
    except SchemaMismatch as error:
        return Check("store", False, str(error), "uv run starter.py migrate")
    finally:
        await database.close()
    return Check("store", True, f"{kind}, schema up to date")


async def _model() -> Check:
    where = settings().openai_base_url
    key = settings().openai_api_key.get_secret_value()
    found = await _get(f"{where}/models", {"Authorization": f"Bearer {key}"} if key else {})
    if isinstance(found, str):
        return Check("model", False, f"{where}: {found}", "check OPENAI_BASE_URL and the network")
    if found.status_code in (401, 403):
        to_do = settings().kept_by_the_stack("OPENAI_API_KEY") or settings().kept_by_the_stack("OPENAI_BASE_URL")
        return Check("model", False, f"{where} refuses the key", to_do or "set OPENAI_API_KEY, or OPENAI_BASE_URL")
    if found.is_error:
        return Check("model", False, f"{where}/models answers {found.status_code}", "check OPENAI_BASE_URL")
    names = [str(each.get("id")) for each in found.json().get("data", [])]
    if names and settings().model not in names:
        some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        return Check("model", False, f"{where} has no {settings().model}", f"set HOLDFAST_MODEL to one of: {some}")
    return Check("model", True, f"{settings().model} at {where}")


REPORT: Json = {
    "type": "function",
    "function": {
        "name": "report_ready",
        "description": "Report that you are ready.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "the word from the message"}},
            "required": ["word"],
        },
    },
}
TRY_TOOL: list[Json] = [
    {"role": "system", "content": "Call the tool report_ready with the word from the message. Say nothing."},
    {"role": "user", "content": '{"word": "ready"}'},
]


async def _tools() -> list[Check]:
    """Sends each model one real request that must end in a tool call: some endpoints accept tools and ignore them."""
    return [await _calls_tools(target) for target in settings().models]


async def _calls_tools(target: ModelTarget) -> Check:
    what = f"tool calls of {target.model}"
    model = ModelClient(settings(), target)
    try:
        answer = await model.complete(TRY_TOOL, [REPORT], key=f"doctor/{token_hex(6)}", must_call=True)
    except ModelUnavailable as gone:
        return Check(what, False, f"not tried: {gone.failure.message}", "fix what it says, else runs wait or fail")
    finally:
        await model.close()
    called = [each["function"]["name"] for each in answer.message.get("tool_calls") or ()]
    if called == ["report_ready"] and is_json(answer.message["tool_calls"][0]["function"]["arguments"]):
        return Check(what, True, f"it calls a tool that it is offered ({answer.usage.output_tokens} tokens)")
    found = "the endpoint ignores tools: asked to call one, the model answered in words"
    if called:
        found = f"asked for one call of report_ready, it called {', '.join(called)}, or sent arguments that are no JSON"
    to_do = (
        "agents cannot work with it: serve it with tool calling on (vLLM: --enable-auto-tool-choice) or take another"
    )
    return Check(what, False, found, to_do)


def is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


async def _hospital() -> Check:
    where = settings().hospital_url
    found = await _get(f"{where}/faults", {})
    if isinstance(found, str) or found.is_error:
        why = found if isinstance(found, str) else f"answers {found.status_code}"
        return Check("hospital (simulated)", False, f"{where}: {why}", "uv run starter.py up, or HOLDFAST_HOSPITAL_URL")
    faults = found.json()
    return Check("hospital (simulated)", True, where + (f", faults set: {', '.join(faults)}" if faults else ""))


async def _get(url: str, headers: dict[str, str]) -> httpx2.Response | str:
    """The response, or a description of why there is none."""
    try:
        async with httpx2.AsyncClient(timeout=5) as http:
            return await http.get(url, headers=headers)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return str(error) or type(error).__name__
