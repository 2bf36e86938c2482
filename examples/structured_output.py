"""An answer in JSON that obeys a schema: print it, and the value that this program reads from it."""

import mlx_gptoss

SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}

with mlx_gptoss.load() as model:
    reply = model.generate("What is 12 + 30?", response_format=SCHEMA, temperature=0)
    print(reply.text)
    print("The sum is", reply.parsed["sum"])
