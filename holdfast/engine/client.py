"""The connection to Temporal: address, data converter, search attributes, and the workflow sandbox.

The address comes from the standard profile and `TEMPORAL_*` (`temporalio.envconfig`), else from the embedded stack,
else it is `localhost:7233`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.bridge.proto.workflow_activation import WorkflowActivation
from temporalio.bridge.proto.workflow_completion import WorkflowActivationCompletion
from temporalio.client import Client
from temporalio.common import SearchAttributeKey
from temporalio.contrib.pydantic import PydanticJSONPlainPayloadConverter
from temporalio.converter import (
    CompositePayloadConverter,
    DataConverter,
    DefaultFailureConverterWithEncodedAttributes,
    DefaultPayloadConverter,
    StorageDriverStoreContext,
)
from temporalio.envconfig import ClientConfigProfile
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import WorkflowInstance, WorkflowInstanceDetails
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from holdfast.contracts import outside
from holdfast.engine.ahead import Ahead
from holdfast.engine.connecting import no_connection
from holdfast.engine.encryption import EncryptionCodec
from holdfast.engine.payload_storage import external_storage
from holdfast.engine.updates import without_large
from holdfast.setting_formats import parse_keys
from holdfast.settings import Settings, settings, temporal_profile
from holdfast.telemetry.tracing import temporal_plugins

AGENT = SearchAttributeKey.for_keyword("HoldfastAgent")
STATUS = SearchAttributeKey.for_keyword("HoldfastStatus")
STAGE = SearchAttributeKey.for_keyword("HoldfastStage")
TENANT = SearchAttributeKey.for_keyword("HoldfastTenant")
SEARCH_ATTRIBUTES = (AGENT, STATUS, STAGE, TENANT)
OPERATORS_ONLY = (RPCStatusCode.UNIMPLEMENTED, RPCStatusCode.PERMISSION_DENIED)
"""Status codes of a server that does not offer the operator service to its users, such as Temporal Cloud."""

MAYBE_DEEP = 150
"""Number of brackets from which on JSON may be nested too deeply to be read."""


class NoServer(Exception):
    """The Temporal server cannot be reached. The message says which server and what to do."""


class _LeanJson(PydanticJSONPlainPayloadConverter):
    """Omits fields that hold their default, which makes a turn's history less than half as large.

    This makes a default part of the format: never change a default; add a new field instead.
    """

    def to_payload(self, value: Any) -> Payload | None:
        try:
            payload = self._to_payload(value)
            if payload is None or _readable(payload.data):
                return payload
        except (ValueError, RecursionError):
            pass  # too deep to be written: shortened below
        # A payload that cannot be read back would be retried for ever. All inputs are checked for this, so only data
        # from before that check gets here.
        plain = value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value
        return super().to_payload(outside.fitting(plain))

    def _to_payload(self, value: Any) -> Payload | None:
        if isinstance(value, BaseModel):
            data = value.__pydantic_serializer__.to_json(value, exclude_defaults=True)
            return Payload(metadata={"encoding": b"json/plain"}, data=data)
        return super().to_payload(value)


def _readable(data: bytes) -> bool:
    """Whether JSON can be read back, which fails from some 200 levels on. Counting brackets decides most cases."""
    if data.count(b"[") + data.count(b"{") < MAYBE_DEEP:
        return True
    try:
        from_json(data)
    except ValueError:
        return False
    return True


# Created once, because the SDK creates a new payload converter for every workflow task.
_CONVERTERS = tuple(
    _LeanJson() if converter.encoding == "json/plain" else converter
    for converter in DefaultPayloadConverter.default_encoding_payload_converters
)


class PayloadConverter(CompositePayloadConverter):
    def __init__(self) -> None:
        super().__init__(*_CONVERTERS)

    def from_payloads(self, payloads: Sequence[Payload], type_hints: list[type] | None = None) -> list[Any]:
        """Reads payloads. Untyped input that cannot be read becomes a text that says so.

        If this raised, the SDK would silently drop a Signal; this way the run records what it ignored. A run whose own
        input cannot be read ends (`start_input.py`); an error here would make the server retry the task for ever.
        """
        return [self._read(payload, hint) for payload, hint in zip_longest(payloads, type_hints or ())]

    def _read(self, payload: Payload, hint: Any) -> Any:
        try:
            return super().from_payloads([payload], [hint])[0]
        except (KeyError, ValueError, RuntimeError):
            if hint in (None, Any):
                encoding = payload.metadata.get("encoding", b"none").decode(errors="replace")
                return f"<not readable, encoding {encoding}: {payload.data[:200]!r}>"
            raise


DATA_CONVERTER = DataConverter(payload_converter_class=PayloadConverter)
"""Converts values to payloads, without encryption and payload storage, which `data_converter` adds."""


def data_converter(settings: Settings, namespace: str) -> DataConverter:
    """Returns the converter of a deployment: JSON, then encryption, then payload storage.

    With encryption on, messages and stack traces of errors are encrypted too, as services may put private data there.
    """
    keys = parse_keys(settings.encryption_keys.get_secret_value())
    converter = replace(
        DATA_CONVERTER,
        # Also without keys: the codec then reports which key is missing for a payload that was encrypted before.
        payload_codec=EncryptionCodec(keys),
        external_storage=external_storage(settings, namespace),
    )
    return (
        replace(converter, failure_converter_class=DefaultFailureConverterWithEncodedAttributes) if keys else converter
    )


LIBRARIES = ("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "opentelemetry")
PASSED_THROUGH = ("holdfast", "activities", *LIBRARIES)
WORKFLOWS = "workflows"


@dataclass(frozen=True)
class _Sandbox(SandboxedWorkflowRunner):
    """The workflow sandbox, without the contexts for payloads, which our converter, codec and storage do not use.

    For each payload the SDK enters the sandbox to get them, which took an eighth of a worker's CPU (temporalio 1.35).
    """

    versioned: bool = False
    evict: Callable[[str], None] | None = None

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        instance = super().create_instance(det)
        instance.get_serialization_context = lambda command_info: None
        instance.get_external_store_context = lambda command_info: _NO_CONTEXT
        activate, ahead = instance.activate, Ahead()

        def watched(act: WorkflowActivation) -> WorkflowActivationCompletion:
            if ahead.moved(act) and self.evict:
                self.evict(act.run_id)
            done = activate(without_large(act))
            if not self.versioned and done.HasField("successful"):
                # The server refuses this field from a worker that does not belong to a Worker Deployment.
                done.successful.ClearField("versioning_behavior")
            return done

        instance.activate = watched
        return instance


_NO_CONTEXT = StorageDriverStoreContext(target=None)


def sandbox(
    versioned: bool = False, evict: Callable[[str], None] | None = None, *, strict: bool = False
) -> SandboxedWorkflowRunner:
    """Returns the sandbox with our modules and pydantic passed through: own copies are most of a parked run's memory.

    versioned: for a worker of a Worker Deployment. For other workers the sandbox removes the workflows' versioning
    behavior.
    evict: makes the worker drop the run with this run id from its cache, after its current activation.
    strict: gives each run its own copy of the workflows' modules, in which a call that is not deterministic fails. The
    copy takes 10 ms of CPU, so the tests check with it and the workers run without.
    """
    passed = PASSED_THROUGH if strict else (*PASSED_THROUGH, WORKFLOWS)
    restrictions = SandboxRestrictions.default.with_passthrough_modules(*passed)
    return _Sandbox(restrictions=restrictions, versioned=versioned, evict=evict)


def profile() -> ClientConfigProfile:
    """Returns where the server is: from profile and environment, else the embedded stack, else the default address."""
    found = temporal_profile()
    return found if found.address else replace(found, address=settings().stack_temporal_address or "localhost:7233")


async def connect() -> Client:
    """Connects a client to the server that `profile` returns. Raises NoServer."""
    where = profile()
    try:
        return await Client.connect(
            **where.to_client_connect_config(),
            data_converter=data_converter(settings(), where.namespace or "default"),
            plugins=temporal_plugins(),
        )
    except RuntimeError as error:
        raise NoServer(no_connection(where, str(error))) from None


async def missing_search_attributes(client: Client) -> list[str]:
    """Returns our search attributes that the namespace lacks. An upsert of a missing one would block a run for good."""
    try:
        there = await client.operator_service.list_search_attributes(
            ListSearchAttributesRequest(namespace=client.namespace)
        )
    except RPCError as error:
        if error.status not in OPERATORS_ONLY:
            raise
        return [key.name for key in SEARCH_ATTRIBUTES if not await _is_searchable(client, key.name)]
    return [key.name for key in SEARCH_ATTRIBUTES if key.name not in there.custom_attributes]


async def _is_searchable(client: Client, name: str) -> bool:
    """Whether a search attribute exists. Checks it with a search, which every user of a namespace may do."""
    try:
        await client.count_workflows(f'{name} = "-"')
    except RPCError as error:
        if error.status is RPCStatusCode.INVALID_ARGUMENT:
            return False
        raise
    return True


async def register_search_attributes(client: Client) -> list[str]:
    """Registers the missing search attributes and returns their names. Raises RPCError without the permission."""
    missing = await missing_search_attributes(client)
    if missing:
        kind = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
        await client.operator_service.add_search_attributes(
            AddSearchAttributesRequest(namespace=client.namespace, search_attributes=dict.fromkeys(missing, kind))
        )
    return missing


__all__ = ["DATA_CONVERTER", "Client", "NoServer", "RPCError", "connect", "data_converter", "sandbox"]
