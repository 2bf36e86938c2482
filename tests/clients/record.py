"""Records what a client sends: a proxy that writes each request and its answer to a file.

    python tests/clients/record.py --to http://127.0.0.1:8080 --port 9090 --out recorded/

Point the client at port 9090. Each exchange becomes recorded/NNN-METHOD-path.json with the request's headers and body
and the answer's status, headers and text. Nothing leaves the machine but to the server at --to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

HOP_BY_HOP = {"host", "connection", "transfer-encoding", "content-length", "accept-encoding", "content-encoding"}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def recorder(to: str, out: Path) -> Starlette:
    """The proxy's application. to: the server's address. out: the folder for the exchanges."""
    out.mkdir(parents=True, exist_ok=True)
    client = httpx.AsyncClient(base_url=to, timeout=None)
    numbers = count(len(list(out.iterdir())))

    async def forward(request: Request) -> StreamingResponse:
        body = await request.body()
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = {name: value for name, value in request.headers.items() if name not in HOP_BY_HOP}
        answer = await client.send(
            client.build_request(request.method, path, headers=headers, content=body), stream=True
        )
        name = f"{next(numbers):03}-{request.method}{request.url.path.replace('/', '-')}.json"

        async def relay() -> AsyncIterator[bytes]:
            received = b""
            try:
                async for chunk in answer.aiter_bytes():
                    received += chunk
                    yield chunk
            finally:
                await answer.aclose()
                exchange = {
                    "request": {"method": request.method, "path": path, "headers": headers, "body": as_json(body)},
                    "response": {
                        "status": answer.status_code,
                        "headers": dict(answer.headers),
                        "body": as_json(received),
                    },
                }
                (out / name).write_text(json.dumps(exchange, indent=1, ensure_ascii=False))

        kept = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP}
        return StreamingResponse(relay(), answer.status_code, kept)

    return Starlette(routes=[Route("/{path:path}", forward, methods=METHODS)])


def as_json(body: bytes) -> Any:
    """The body as JSON, or as text where it is none."""
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default="http://127.0.0.1:8080", help="the server's address")
    parser.add_argument("--port", type=int, default=9090, help="where the proxy listens, on the loopback")
    parser.add_argument("--out", type=Path, default=Path("recorded"), help="the folder for the exchanges")
    arguments = parser.parse_args()
    uvicorn.run(recorder(arguments.to, arguments.out), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
