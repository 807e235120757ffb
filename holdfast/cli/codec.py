"""`starter.py codec-server`: Temporal's remote codec, for the Web UI."""

from __future__ import annotations

from urllib.parse import urlsplit

import uvicorn

from holdfast.cli.output import Refused
from holdfast.engine import payload_storage
from holdfast.engine.client import data_converter, profile
from holdfast.engine.codec_server import app
from holdfast.settings import settings


async def serve(host: str, port: int, origins: list[str]) -> int:
    """Serves until a signal stops it and returns the exit status. Raises Refused without a token."""
    token = settings().codec_token.get_secret_value()
    if not token:
        raise Refused("HOLDFAST_CODEC_TOKEN is not set: its holders can read every payload, so make it long and random")
    converter = data_converter(settings(), profile().namespace or "default")
    allowed = [_origin(each) for each in origins or [settings().ui_url]]
    config = uvicorn.Config(app(converter, token, allowed), host=host, port=port, log_level="warning")
    print(f"codec server at http://{host}:{port} for {', '.join(allowed)}", flush=True)
    try:
        await uvicorn.Server(config).serve()
    finally:
        await payload_storage.close(converter.external_storage)
    return 0


def _origin(url: str) -> str:
    """The origin of an address, such as `http://localhost:8233`. Raises Refused."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise Refused(f"--ui {url}: expected an origin such as http://localhost:8233")
    return f"{parts.scheme}://{parts.netloc}"
