"""A web app: python examples/fastapi_app.py [PORT], then curl -N "http://127.0.0.1:8000/ask?question=Hello"."""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

import mlx_gptoss


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with mlx_gptoss.load(slots=4) as app.state.model:  # four requests at once; others wait
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/answer")
async def answer(question: str) -> dict:
    reply = await app.state.model.agenerate(question, temperature=0)
    return {"answer": reply.text, "tokens": reply.usage.total_tokens}


@app.get("/ask")
async def ask(question: str) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:  # a client that leaves ends the generation
        async for event in app.state.model.astream(question):
            if isinstance(event, mlx_gptoss.TextDelta):
                yield f"data: {json.dumps(event.text)}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
