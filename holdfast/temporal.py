"""The connection to Temporal: address, data converter, search attributes, and what the workflows may import.

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

from holdfast import outside
from holdfast.ahead import Ahead
from holdfast.claims import external_storage
from holdfast.codec import EncryptionCodec, parse_keys
from holdfast.connecting import no_connection
from holdfast.settings import Settings, settings, temporal_profile
from holdfast.telemetry.tracing import temporal_plugins
from holdfast.updates import without_large

AGENT = SearchAttributeKey.for_keyword("HoldfastAgent")
STATUS = SearchAttributeKey.for_keyword("HoldfastStatus")
STAGE = SearchAttributeKey.for_keyword("HoldfastStage")
TENANT = SearchAttributeKey.for_keyword("HoldfastTenant")
SEARCH_ATTRIBUTES = (AGENT, STATUS, STAGE, TENANT)
OPERATORS_ONLY = (RPCStatusCode.UNIMPLEMENTED, RPCStatusCode.PERMISSION_DENIED)
"""How a server says that a call of the operator service is not for its users, as Temporal Cloud does."""

MAYBE_DEEP = 150
"""Brackets from which on JSON may be too deep to be read."""


class NoServer(Exception):
    """The Temporal server cannot be reached. The message says where and what to do."""


class _LeanJson(PydanticJSONPlainPayloadConverter):
    """Leaves out fields that hold their default, which more than halves a turn's history.

    The price: a default is part of the format. Never change one; add a new field instead.
    """

    def to_payload(self, value: Any) -> Payload | None:
        try:
            payload = self._to_payload(value)
            if payload is None or _readable(payload.data):
                return payload
        except (ValueError, RecursionError):
            pass  # too deep to be written: cut below
        # What cannot be read again would be tried again for ever. Every door refuses it, so this is data of before.
        plain = value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value
        return super().to_payload(outside.fitting(plain))

    def _to_payload(self, value: Any) -> Payload | None:
        if isinstance(value, BaseModel):
            data = value.__pydantic_serializer__.to_json(value, exclude_defaults=True)
            return Payload(metadata={"encoding": b"json/plain"}, data=data)
        return super().to_payload(value)


def _readable(data: bytes) -> bool:
    """Whether JSON can be read again, which is not so from some 200 levels on. Most data needs no look."""
    if data.count(b"[") + data.count(b"{") < MAYBE_DEEP:
        return True
    try:
        from_json(data)
    except ValueError:
        return False
    return True


# Made once: the SDK makes a payload converter anew for every workflow task.
_CONVERTERS = tuple(
    _LeanJson() if converter.encoding == "json/plain" else converter
    for converter in DefaultPayloadConverter.default_encoding_payload_converters
)


class PayloadConverter(CompositePayloadConverter):
    def __init__(self) -> None:
        super().__init__(*_CONVERTERS)

    def from_payloads(self, payloads: Sequence[Payload], type_hints: list[type] | None = None) -> list[Any]:
        """Untyped input that cannot be read becomes a text that says so.

        Raising would make the SDK drop a Signal without a trace; this way the run records what it ignored. A run's own
        input that cannot be read ends the run (`workflows.given`): an error here would try the task again for ever.
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
"""How values become payloads; without what a deployment adds: `data_converter`."""


def data_converter(settings: Settings, namespace: str) -> DataConverter:
    """The converter of a deployment: first the values' JSON, then encryption, then the claim check.

    With encryption on, the words and stack traces of errors are encrypted too: services put into them what they like.
    """
    keys = parse_keys(settings.encryption_keys.get_secret_value())
    converter = replace(
        DATA_CONVERTER,
        # Without keys as well: it says which key is missing for what was encrypted before.
        payload_codec=EncryptionCodec(keys),
        external_storage=external_storage(settings, namespace),
    )
    return (
        replace(converter, failure_converter_class=DefaultFailureConverterWithEncodedAttributes) if keys else converter
    )


PASSED_THROUGH = ("holdfast", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "opentelemetry")


@dataclass(frozen=True)
class _Sandbox(SandboxedWorkflowRunner):
    """The sandbox, without asking each run for a context that our converter, codec and storage do not look at.

    The SDK enters the sandbox anew for every payload to ask, which was an eighth of a worker's CPU (temporalio 1.35).
    """

    versioned: bool = False
    evict: Callable[[str], None] | None = None

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        instance = super().create_instance(det)
        instance.get_serialization_context = lambda command_info: None
        instance.get_external_store_context = lambda command_info: _NOWHERE
        activate, ahead = instance.activate, Ahead()

        def watched(act: WorkflowActivation) -> WorkflowActivationCompletion:
            if ahead.moved(act) and self.evict:
                self.evict(act.run_id)
            done = activate(without_large(act))
            if not self.versioned and done.HasField("successful"):
                # The server refuses it of a worker that is no build of a Worker Deployment.
                done.successful.ClearField("versioning_behavior")
            return done

        instance.activate = watched
        return instance


_NOWHERE = StorageDriverStoreContext(target=None)


def sandbox(versioned: bool = False, evict: Callable[[str], None] | None = None) -> SandboxedWorkflowRunner:
    """The sandbox, with our library and pydantic imported once: most of a parked run's memory is its own copies.

    versioned: for a worker of a Worker Deployment; another one leaves out the workflows' versioning behaviour.
    evict: makes the worker drop the run with this run id from its cache, once what is under way is done.
    """
    restrictions = SandboxRestrictions.default.with_passthrough_modules(*PASSED_THROUGH)
    return _Sandbox(restrictions=restrictions, versioned=versioned, evict=evict)


def profile() -> ClientConfigProfile:
    """Where the server is: profile and environment first, then the embedded stack, then the default address."""
    found = temporal_profile()
    return found if found.address else replace(found, address=settings().stack_temporal_address or "localhost:7233")


async def connect() -> Client:
    """A client as `profile` says. Raises NoServer."""
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
    """Names of ours that the namespace does not have. An upsert of one of these would block a run for good."""
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
    """Asked by a search, which every user of a namespace may do."""
    try:
        await client.count_workflows(f'{name} = "-"')
    except RPCError as error:
        if error.status is RPCStatusCode.INVALID_ARGUMENT:
            return False
        raise
    return True


async def register_search_attributes(client: Client) -> list[str]:
    """Registers what is missing and returns the names. Raises RPCError without the right to do it."""
    missing = await missing_search_attributes(client)
    if missing:
        kind = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
        await client.operator_service.add_search_attributes(
            AddSearchAttributesRequest(namespace=client.namespace, search_attributes=dict.fromkeys(missing, kind))
        )
    return missing


__all__ = ["DATA_CONVERTER", "Client", "NoServer", "RPCError", "connect", "data_converter", "sandbox"]
