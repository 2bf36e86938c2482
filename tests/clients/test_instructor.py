"""instructor, unmodified: a typed answer in each of its modes for OpenAI's API."""

from __future__ import annotations

import openai
import pydantic
import pytest
from scripted import calls, says

instructor = pytest.importorskip(
    "instructor", reason="instructor is not installed (it needs an older jiter than openai)"
)
MODES = {
    "TOOLS": calls("City", '{"name": "Oslo"}'),
    "TOOLS_STRICT": calls("City", '{"name": "Oslo"}'),
    "RESPONSES_TOOLS": calls("City", '{"name": "Oslo"}'),
    "JSON": says('{"name": "Oslo"}'),
    "JSON_SCHEMA": says('{"name": "Oslo"}'),
    "MD_JSON": says('```json\n{"name": "Oslo"}\n```'),
}


class City(pydantic.BaseModel):
    name: str


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_typed_answer(scripted_server, mode):
    server = scripted_server([[MODES[mode]]])
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    patched = instructor.from_openai(client, mode=instructor.Mode[mode])
    asked = [{"role": "user", "content": "What is the capital of Norway?"}]
    city = patched.chat.completions.create(model="gpt-oss-20b", response_model=City, max_retries=0, messages=asked)
    assert city.name == "Oslo"
