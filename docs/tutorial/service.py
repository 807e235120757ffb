"""A service to call in the tutorial: it books rooms, sends invitations, and lists what it has done.

uv run docs/tutorial/service.py 9000

Bookings honour an idempotency key. Invitations do not, but a client can ask for one by its reference. The service keeps
everything in memory.
"""

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

BOOKINGS: dict[str, dict[str, str]] = {}
INVITATIONS: list[dict[str, str]] = []


async def book(request: Request) -> Response:
    wanted = await request.json()
    room = "the large one" if wanted["seats"] > 4 else "the small one"
    booking = BOOKINGS.setdefault(request.headers["Idempotency-Key"], {"topic": wanted["topic"], "room": room})
    return JSONResponse({"room": booking["room"]}, 201)


async def cancel(request: Request) -> Response:
    return Response(status_code=204 if BOOKINGS.pop(request.query_params["key"], None) else 404)


async def invite(request: Request) -> Response:
    INVITATIONS.append(await request.json())
    return JSONResponse({"sent": True}, 202)


async def invited(request: Request) -> Response:
    found = [each for each in INVITATIONS if each["reference"] == request.query_params["reference"]]
    return JSONResponse({"sent": True}) if found else Response(status_code=404)


async def record(request: Request) -> Response:
    return JSONResponse({"bookings": BOOKINGS, "invitations": INVITATIONS})


app = Starlette(
    routes=[
        Route("/", record),
        Route("/bookings", book, methods=["POST"]),
        Route("/bookings", cancel, methods=["DELETE"]),
        Route("/invitations", invite, methods=["POST"]),
        Route("/invitations", invited),
    ]
)

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
