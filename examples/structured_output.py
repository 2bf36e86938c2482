"""An answer in JSON that obeys a schema: print it, and the value that this program reads from it."""

import json

import mlx_gptoss

SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}

with mlx_gptoss.load() as model:
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}
    reply = model.generate("What is 12 + 30?", response_format=form)
    print(reply.text)
    print("The sum is", json.loads(reply.text)["sum"])
