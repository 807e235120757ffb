"""Payload storage: payloads above a limit go to storage outside Temporal, and history holds a reference.

The first address is written, and all addresses are read, always including our own store, so the place can be changed
while runs are open. Payloads pass the codec before storage, so they are encrypted when encryption is on. The name of a
payload is the SHA-256 of its content: storing it twice has no further effect, and reading checks it against its name.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from temporalio.api.common.v1 import Payload
from temporalio.contrib.aws.s3driver import S3StorageDriver, S3StorageDriverClient
from temporalio.converter import (
    ExternalStorage,
    StorageDriver,
    StorageDriverClaim,
    StorageDriverRetrieveContext,
    StorageDriverStoreContext,
)

from holdfast.files import write_whole
from holdfast.setting_formats import addresses, kind
from holdfast.settings import Settings
from holdfast.state.database import Database
from holdfast.state.opening import open_database
from holdfast.state.payloads import StoredPayloads

VARIABLE = "HOLDFAST_PAYLOAD_STORE"
S3_MAX = 1 << 30
"""Bytes. Sizes are limited where payloads are created; a limit here would only stop runs that are under way."""


class PayloadLost(Exception):
    """A large payload is missing from payload storage, or was changed. The message is one line with what to do.

    A workflow or activity task that needs such a payload fails and is retried, so the run goes on once it is restored.
    """


def external_storage(settings: Settings, namespace: str) -> ExternalStorage:
    """Returns the storage that the settings name. Opens nothing yet. Raises ValueError for an invalid address."""
    drivers = [_driver(address, settings, namespace) for address in addresses(settings.payload_store)]
    if not any(isinstance(driver, StoreDriver) for driver in drivers):
        drivers.append(StoreDriver(settings.store_url, namespace))
    first = drivers[0]
    return ExternalStorage(
        drivers=drivers, driver_selector=lambda context, payload: first, payload_size_threshold=settings.payload_limit
    )


def _driver(address: str, settings: Settings, namespace: str) -> StorageDriver:
    url = urlsplit(address)
    match kind(address):
        case "file":
            return FileDriver(Path(unquote(url.path)))
        case "s3":
            client = _S3(url.path.strip("/"))
            return S3StorageDriver(client=client, bucket=url.netloc, max_payload_size=S3_MAX)
        case _:
            return StoreDriver(settings.store_url, namespace)


class _ByContent(StorageDriver):
    """Stores payloads under the SHA-256 of their bytes, independent of the workflow."""

    async def store(self, context: StorageDriverStoreContext, payloads: Sequence[Payload]) -> list[StorageDriverClaim]:
        return [await self._store(payload.SerializeToString()) for payload in payloads]

    async def _store(self, content: bytes) -> StorageDriverClaim:
        digest = sha256(content).hexdigest()
        await self.put(digest, content)
        return StorageDriverClaim({"sha256": digest})

    async def retrieve(
        self, context: StorageDriverRetrieveContext, claims: Sequence[StorageDriverClaim]
    ) -> list[Payload]:
        return [await self._retrieve(claim.claim_data.get("sha256", "")) for claim in claims]

    async def _retrieve(self, digest: str) -> Payload:
        content = await self.get(digest)
        if content is None:
            raise PayloadLost(
                f"a large payload, {digest[:16]}…, is not in {self.where}: bring it back there (from a backup), "
                f"or add the place where it is stored to {VARIABLE} of this process"
            )
        if sha256(content).hexdigest() != digest:
            raise PayloadLost(
                f"a large payload, {digest[:16]}…, was changed in {self.where}: bring it back from a backup"
            )
        return Payload.FromString(content)

    where: str
    """The name of the place, for messages."""

    @abstractmethod
    async def put(self, digest: str, content: bytes) -> None:
        """Stores the content durably. Idempotent."""

    @abstractmethod
    async def get(self, digest: str) -> bytes | None:
        """Returns the content, or None when there is none."""


class StoreDriver(_ByContent):
    """Stores payloads in the table `claims` of our store, over its own connection, as a client has no runtime."""

    where = "the store"

    def __init__(self, url: str, namespace: str) -> None:
        self._url = url
        self._namespace = namespace
        self._opening = asyncio.Lock()
        self._open: tuple[Database, StoredPayloads] | None = None

    def name(self) -> str:
        return "holdfast.store"

    async def put(self, digest: str, content: bytes) -> None:
        await (await self._claims()).put(digest, self._namespace, content)

    async def get(self, digest: str) -> bytes | None:
        return await (await self._claims()).get(digest)

    async def _claims(self) -> StoredPayloads:
        async with self._opening:
            if self._open is None:
                db = await open_database(self._url)
                self._open = db, StoredPayloads(db)
            return self._open[1]

    async def close(self) -> None:
        if self._open:
            await self._open[0].close()
            self._open = None


class FileDriver(_ByContent):
    """Stores payloads as files, one per content, in a directory that all processes have to share."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.where = str(directory)

    def name(self) -> str:
        return "holdfast.files"

    async def put(self, digest: str, content: bytes) -> None:
        await asyncio.to_thread(self._write, digest, content)

    async def get(self, digest: str) -> bytes | None:
        return await asyncio.to_thread(self._read, digest)

    def _write(self, digest: str, content: bytes) -> None:
        file = self._file(digest)
        if file.exists():
            file.touch()  # in use again: a cleanup by age has to see it
            return
        write_whole(file, content)

    def _read(self, digest: str) -> bytes | None:
        try:
            return self._file(digest).read_bytes()
        except FileNotFoundError:
            return None

    def _file(self, digest: str) -> Path:
        if not digest.isalnum():
            raise PayloadLost(f"a reference to a large payload is invalid: {digest[:16]!r} is not a SHA-256 digest")
        return self._directory / digest[:2] / digest


class _S3(S3StorageDriverClient):
    """The SDK's client for aioboto3, opened when it is first needed, with a prefix before every key.

    Credentials, region and endpoint are AWS's own variables (`AWS_PROFILE`, `AWS_ENDPOINT_URL_S3`, …).
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = f"{prefix}/" if prefix else ""
        self._opening = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._open: S3StorageDriverClient | None = None

    async def _client(self) -> S3StorageDriverClient:
        async with self._opening:
            if self._open is None:
                try:
                    import aioboto3
                    from temporalio.contrib.aws.s3driver.aioboto3 import new_aioboto3_client
                except ImportError:
                    raise PayloadLost(f"{VARIABLE} names S3, which needs the extra: `uv sync --extra s3`") from None
                session: Any = aioboto3.Session()
                self._open = new_aioboto3_client(await self._stack.enter_async_context(session.client("s3")))
            return self._open

    async def put_object(self, *, bucket: str, key: str, data: bytes) -> None:
        await (await self._client()).put_object(bucket=bucket, key=self._prefix + key, data=data)

    async def object_exists(self, *, bucket: str, key: str) -> bool:
        """Always False: a payload in use again is stored again, so that the bucket's rule by age does not delete it."""
        return False

    async def get_object(self, *, bucket: str, key: str) -> bytes:
        return await (await self._client()).get_object(bucket=bucket, key=self._prefix + key)

    async def close(self) -> None:
        await self._stack.aclose()
        self._open = None


async def close(storage: ExternalStorage | None) -> None:
    """Closes the connections that the drivers have opened."""
    for driver in storage.drivers if storage else ():
        opened = driver._client if isinstance(driver, S3StorageDriver) else driver
        if isinstance(opened, StoreDriver | _S3):
            await opened.close()
