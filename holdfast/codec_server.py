"""Temporal's remote codec over HTTP: the Web UI and the `temporal` command show plain text to whoever holds a token.

`POST /decode` and `/encode` take and give payloads as JSON. What the claim check has put elsewhere is fetched by
`/download` and by `/decode`, except with `?preserveStorageRefs=true`, as the Web UI asks. The token comes as a bearer
token, or as a cookie that the page `/` sets: the Web UI cannot send a token.
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

from holdfast.claims import ClaimLost
from holdfast.codec import EncryptionCodec, PayloadUnreadable
from holdfast.state.database import one_line

log = logging.getLogger(__name__)

COOKIE = "holdfast-codec"
MAX_BODY = 64_000_000
"""Bytes of a request; a page of the Web UI has less than Temporal takes in a workflow's whole history."""
MAX_FORM = 10_000
Transform = Callable[[Sequence[Payload]], Awaitable[list[Payload]]]

PAGE = """<!doctype html><meta charset="utf-8"><title>Codec server</title>
<style>body { font: 16px system-ui; max-width: 36em; margin: 4em auto } input, button { font: inherit }</style>
<h1>Codec server</h1><p>%s</p>
<form method="post"><label>Token <input type="password" name="token" autofocus></label> <button>Sign in</button></form>
<p>In Temporal's Web UI, behind the glasses at the top: <b>Use my browser setting</b>, this page's address as the
endpoint, and <b>Include cross-origin credentials</b>.</p>"""


class _AsTheyAre(PayloadConverter):
    """Payloads for values: what comes out of codec and storage, as it is."""

    def to_payloads(self, values: Sequence[Payload]) -> list[Payload]:
        return list(values)

    def from_payloads(self, payloads: Sequence[Payload], type_hints: list[type] | None = None) -> list[Payload]:
        return list(payloads)


def app(converter: DataConverter, token: str, origins: Sequence[str]) -> Starlette:
    """The server's application. origins: of the Web UIs whose scripts may call it, e.g. `http://localhost:8233`."""
    codec = converter.payload_codec
    assert isinstance(codec, EncryptionCodec)
    assert token, "without a token nobody may read"
    stored = replace(converter, payload_converter_class=_AsTheyAre)

    async def decode(payloads: Sequence[Payload], transform: Transform = stored.decode) -> list[Payload]:
        """One that cannot be read becomes words: it must not hide all others of its page."""
        return [await _or_words(transform, payload) for payload in payloads]

    async def decode_here(payloads: Sequence[Payload]) -> list[Payload]:
        return await decode(payloads, codec.decode)

    def endpoint(path: str, transform: Transform, preserving: Transform | None = None) -> Route:
        async def answer(request: Request) -> Response:
            if not _allowed(request, token):
                return PlainTextResponse(f"sign in at {request.base_url}, or send the token as a bearer token", 401)
            try:
                given = Parse(await _body(request, MAX_BODY), Payloads())
                keeps = request.query_params.get("preserveStorageRefs") == "true"
                chosen = preserving if preserving and keeps else transform
                made = Payloads(payloads=await chosen(given.payloads))
            except (ParseError, UnicodeDecodeError) as error:
                return PlainTextResponse(f"not payloads as JSON: {error}", 400)
            except HTTPException:
                raise
            except Exception as error:  # noqa: BLE001 - drivers raise what they like; none is swallowed, it is the answer
                return PlainTextResponse(_words(error), 400)
            return Response(MessageToJson(made), media_type="application/json")

        return Route(path, answer, methods=["POST"])

    async def sign_in(request: Request) -> Response:
        if request.method == "GET":
            words = "You are signed in." if _allowed(request, token) else "Who holds the token may read what runs say."
            return HTMLResponse(PAGE % words)
        given = parse_qs((await _body(request, MAX_FORM)).decode(errors="replace")).get("token", [""])[0]
        if not _same(given, token):
            return HTMLResponse(PAGE % "That is not the token.", 401)
        answer = RedirectResponse("/", 303)
        # Strict: sent along only by pages of the same site, which on one host is any port of it.
        # Behind a proxy that ends TLS the request's scheme tells nothing, but a page of HTTPS may call nothing else.
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
    """In constant time."""
    return compare_digest(given.encode(), token.encode())


async def _body(request: Request, most: int) -> bytes:
    """Raises HTTPException 413 for more than `most` bytes: nobody, known or not, may fill the memory."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > most:
            raise HTTPException(413, f"at most {most:,} bytes are taken")
    return bytes(raw)


async def _or_words(transform: Transform, payload: Payload) -> Payload:
    try:
        return (await transform([payload]))[0]
    except Exception as error:  # noqa: BLE001 - drivers raise what they like; it stands in the payload's place
        words = json.dumps(f"<not readable: {_words(error)}>").encode()
        return Payload(metadata={"encoding": b"json/plain"}, data=words)


def _words(error: Exception) -> str:
    if not isinstance(error, PayloadUnreadable | ClaimLost | ValueError):
        log.warning("a payload cannot be read: %s", one_line(error), exc_info=error)
    return one_line(error) or type(error).__name__
