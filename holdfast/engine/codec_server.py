"""Codec server: Temporal's remote codec over HTTP. It shows plain text in the Web UI and the `temporal` command.

`POST /decode` and `/encode` take and return payloads as JSON. `/download` and `/decode` fetch payloads from payload
storage; `/decode?preserveStorageRefs=true`, as the Web UI calls it, does not. Callers need the token, as a bearer token
or in the cookie that the page `/` sets, because the Web UI cannot send a token.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from hmac import compare_digest
from urllib.parse import parse_qs

from google.protobuf.json_format import MessageToJson, Parse, ParseError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.converter import DataConverter, PayloadConverter

from holdfast.engine.encryption import EncryptionCodec, PayloadUnreadable
from holdfast.engine.payload_storage import PayloadLost
from holdfast.state.database import one_line

log = logging.getLogger(__name__)

COOKIE = "holdfast-codec"
MAX_BODY = 64_000_000
"""Largest request in bytes. A page of the Web UI is smaller than the largest history that Temporal accepts."""
MAX_FORM = 10_000
Transform = Callable[[Sequence[Payload]], Awaitable[list[Payload]]]

PAGE = """<!doctype html><meta charset="utf-8"><title>Codec server</title>
<style>body { font: 16px system-ui; max-width: 36em; margin: 4em auto } input, button { font: inherit }</style>
<h1>Codec server</h1><p>%s</p>
<form method="post"><label>Token <input type="password" name="token" autofocus></label> <button>Sign in</button></form>
<p>In Temporal's Web UI, click the glasses at the top. Select <b>Use my browser setting</b>, enter this page's address
as the endpoint, and select <b>Include cross-origin credentials</b>.</p>"""


class _RawPayloads(PayloadConverter):
    """Passes payloads through: the caller gets what codec and storage return."""

    def to_payloads(self, values: Sequence[Payload]) -> list[Payload]:
        return list(values)

    def from_payloads(self, payloads: Sequence[Payload], type_hints: list[type] | None = None) -> list[Payload]:
        return list(payloads)


def app(converter: DataConverter, token: str, origins: Sequence[str]) -> Starlette:
    """Returns the ASGI application. origins: of the Web UIs that may call it, e.g. `http://localhost:8233`."""
    codec = converter.payload_codec
    assert isinstance(codec, EncryptionCodec)
    assert token, "the codec server needs a token"
    stored = replace(converter, payload_converter_class=_RawPayloads)

    async def decode(payloads: Sequence[Payload], transform: Transform = stored.decode) -> list[Payload]:
        """Decodes payloads. An unreadable one becomes a text, so that it does not hide all others of its page."""
        return [await _or_placeholder(transform, payload) for payload in payloads]

    async def decode_here(payloads: Sequence[Payload]) -> list[Payload]:
        return await decode(payloads, codec.decode)

    def endpoint(path: str, transform: Transform, preserving: Transform | None = None) -> Route:
        async def answer(request: Request) -> Response:
            if not _allowed(request, token):
                words = f"not signed in: sign in at {request.base_url}, or send the token as a bearer token"
                return PlainTextResponse(words, 401)
            try:
                given = Parse(await _body(request, MAX_BODY), Payloads())
                keeps = request.query_params.get("preserveStorageRefs") == "true"
                chosen = preserving if preserving and keeps else transform
                made = Payloads(payloads=await chosen(given.payloads))
            except (ParseError, UnicodeDecodeError) as error:
                return PlainTextResponse(f"not payloads as JSON: {error}", 400)
            except HTTPException:
                raise
            except Exception as error:  # noqa: BLE001 - drivers raise any error; the response reports it
                return PlainTextResponse(_error_text(error), 400)
            return Response(MessageToJson(made), media_type="application/json")

        return Route(path, answer, methods=["POST"])

    async def sign_in(request: Request) -> Response:
        if request.method == "GET":
            signed_in = _allowed(request, token)
            words = "You are signed in." if signed_in else "Sign in with the token to read the payloads of runs."
            return HTMLResponse(PAGE % words)
        given = parse_qs((await _body(request, MAX_FORM)).decode(errors="replace")).get("token", [""])[0]
        if not _same(given, token):
            return HTMLResponse(PAGE % "The token is wrong. Check it and sign in again.", 401)
        answer = RedirectResponse("/", 303)
        # Strict: only pages of the same site send the cookie; on one host that includes all its ports.
        # Behind a proxy that ends TLS, the request's scheme is no evidence; but an HTTPS page can call only HTTPS.
        secure = request.url.scheme == "https" or all(each.startswith("https:") for each in origins)
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=secure)
        return answer

    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["POST"],
        allow_headers=["authorization", "content-type", "x-namespace"],
        allow_credentials=True,
    )
    routes = [
        endpoint("/encode", codec.encode),
        endpoint("/decode", decode, preserving=decode_here),
        endpoint("/download", stored.decode),
        Route("/", sign_in, methods=["GET", "POST"]),
    ]
    return Starlette(routes=routes, middleware=[cors])


def _allowed(request: Request, token: str) -> bool:
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    bearer = sent.strip() if scheme.lower() == "bearer" else ""
    return _same(bearer, token) or _same(request.cookies.get(COOKIE, ""), token)


def _same(given: str, token: str) -> bool:
    """Compares in constant time."""
    return compare_digest(given.encode(), token.encode())


async def _body(request: Request, most: int) -> bytes:
    """Reads the body. Raises HTTPException 413 for more than `most` bytes, so that no caller can fill the memory."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > most:
            raise HTTPException(413, f"the request is larger than {most:,} bytes: send fewer payloads at once")
    return bytes(raw)


async def _or_placeholder(transform: Transform, payload: Payload) -> Payload:
    try:
        return (await transform([payload]))[0]
    except Exception as error:  # noqa: BLE001 - drivers raise any error; the placeholder reports it
        words = json.dumps(f"<not readable: {_error_text(error)}>").encode()
        return Payload(metadata={"encoding": b"json/plain"}, data=words)


def _error_text(error: Exception) -> str:
    if not isinstance(error, PayloadUnreadable | PayloadLost | ValueError):
        log.warning("a payload cannot be read: %s", one_line(error), exc_info=error)
    return one_line(error) or type(error).__name__
