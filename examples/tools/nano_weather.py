"""Questions about the weather: how get_weather is offered, called and reported, and the answer without it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

import nano_facts as facts
import nano_words as words
from nano_questions import Ask, Turn, dress, syllables

from mlx_gptoss.harmony.messages import Effort, Function, Message


def place(r: Random) -> str:
    form = r.random()
    if form < 0.6:
        return r.choice(words.CITIES)
    name = syllables(r, r.randint(1, 3)).capitalize()
    return f"{r.choice(('New', 'San', 'Port', 'Saint', 'North', 'Bad'))} {name}" if form > 0.92 else name


@dataclass(frozen=True)
class WeatherTool:
    """The weather function of one conversation: its name, its parameter, and all functions that are offered."""

    name: str
    parameter: str
    functions: tuple[Function, ...]

    @property
    def recipient(self) -> str:
        return f"functions.{self.name}"


def weather_tool(r: Random) -> WeatherTool:
    name = "get_weather" if r.random() < 0.85 else "get_current_weather"
    parameter = "location" if r.random() < 0.85 else "city"
    schema: dict[str, object] = {"type": "string"}
    if r.random() < 0.6:
        schema["description"] = r.choice(words.PARAMETER_DESCRIPTIONS)
    properties: dict[str, object] = {parameter: schema}
    if r.random() < 0.25:
        properties[r.choice(("unit", "format"))] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    description = r.choice(words.FUNCTION_DESCRIPTIONS) if r.random() < 0.9 else ""
    if r.random() < 0.1:
        description += f" Uses {syllables(r, 3)} {syllables(r, 2)}."
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    if r.random() < 0.1:
        del parameters["required"]
    functions = [Function(name, description, parameters)]
    if r.random() < 0.25:
        functions.insert(r.randint(0, 1), r.choice(OTHER_FUNCTIONS))
    return WeatherTool(name, parameter, tuple(functions))


def _function(name: str, description: str, **types: str) -> Function:
    properties = {key: {"type": kind} for key, kind in types.items()}
    return Function(name, description, {"type": "object", "properties": properties, "required": list(types)})


OTHER_FUNCTIONS = (
    Function("get_time", "Gets the current time."),
    _function("search", "Searches the web.", query="string"),
    _function("get_stock_price", "Get the price of a stock.", symbol="string"),
    _function("send_email", "Send an email.", to="string", body="string"),
    _function("play_music", "Plays a song.", title="string"),
    _function("set_timer", "Set a timer.", minutes="number"),
)


def call(tool: WeatherTool, city: str, effort: Effort) -> Turn:
    thought = f"The user asks about the weather in {city}. I call {tool.name}."
    if effort == "low":
        thought = f"I call {tool.name}."
    elif effort == "high":
        thought += f"\nIt needs the {tool.parameter}: {city}.\nIts result will tell me what to answer."
    arguments = json.dumps({tool.parameter: city}, ensure_ascii=False)
    return Turn(thought, recipient=tool.recipient, arguments=arguments)


def call_ask(r: Random, effort: Effort, tool: WeatherTool) -> Ask:
    city = place(r)
    question = dress_place(r, r.choice(words.WEATHER_QUESTIONS).format(city=city), city)
    return Ask("weather call", question, call(tool, city, effort), city)


def dress_place(r: Random, question: str, city: str) -> str:
    """Like `dress`, but the city keeps its case, because the call copies it."""
    return dress(r, question.replace(city, "\0")).replace("\0", city)


def result_ask(r: Random, effort: Effort, tool: WeatherTool) -> Ask:
    """A question whose turn reports the function's result."""
    asked = call_ask(r, effort, tool)
    city = json.loads(asked.turn.arguments)[tool.parameter]
    degrees, sky = str(r.randint(-20, 42)), r.choice(words.SKIES)
    result, answer = weather_result(r, city, degrees, sky)
    thought = f"{tool.name} has answered. I tell the user."
    if effort == "low":
        thought = "I tell the user."
    elif effort == "high":
        thought += f"\nThe result is about {city}.\nI would answer: {answer}\nThat is right."
    kind = "<|constrain|>json" if r.random() < 0.85 else "json"
    called = Message("assistant", asked.turn.arguments, "commentary", tool.recipient, kind)
    said = Message("tool", result, "commentary", "assistant", name=tool.recipient)
    reasoned = (Message("assistant", asked.turn.analysis, "analysis"),) if r.random() < 0.5 else ()
    turn = Turn(thought, answer)
    return Ask("weather answer", asked.question, turn, f"{city} {degrees}", (*reasoned, called, said))


def weather_result(r: Random, city: str, degrees: str, sky: str) -> tuple[str, str]:
    """A function's result, in one of several common shapes, and the sentence that reports it."""
    form = r.random()
    value = int(degrees)
    if form < 0.08:
        return json.dumps({"temperature": value}), f"It is {degrees} degrees in {city}."
    if form < 0.16:
        return json.dumps({r.choice(words.SKY_KEYS): sky}), f"It is {sky} in {city}."
    answer = f"It is {degrees} degrees and {sky} in {city}."
    if form < 0.24:
        return r.choice(("{} degrees and {}", "{} degrees, {}", "{}°C, {}", "{} C, {}")).format(degrees, sky), answer
    fields: list[tuple[str, object]] = [
        (r.choice(("temperature", "temperature", "temp")), value),
        (r.choice(words.SKY_KEYS), sky),
    ]
    if r.random() < 0.2:
        fields.reverse()
    if r.random() < 0.2:
        fields.insert(r.randint(0, 2), ("unit", r.choice(("celsius", "C"))))
    if r.random() < 0.2:
        fields.insert(0, (r.choice(("location", "city")), city))
    tight = (",", ":") if r.random() < 0.3 else None
    return json.dumps(dict(fields), separators=tight, ensure_ascii=False), answer


def no_tool_ask(r: Random, effort: Effort) -> Ask:
    city = place(r)
    question = dress_place(r, r.choice(words.WEATHER_QUESTIONS).format(city=city), city)
    thought = "No function for the weather." + {"low": "", "medium": " I say so."}.get(
        effort, f" I say so.\nThe user asks about the weather in {city}, but I cannot know it."
    )
    return Ask("no weather", question, Turn(thought, facts.NO_WEATHER), city)
