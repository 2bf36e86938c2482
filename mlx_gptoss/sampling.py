"""How the next token is chosen: one frozen, validated description that every backend implements alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError, InvalidRequest
from .options.check import integer, kind, number
from .options.declare import documented, option
from .options.sampling import told

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024  # of one stop string
MAX_ID = 2**31 - 1  # of any vocabulary; the engine checks ids against the model's own


@documented
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The steps, in this order, which is that of OpenAI's API and of vLLM: logits, plus logit_bias, then repetition,
    presence and frequency penalties, then divided by the temperature, then top_k, top_p and min_p, then one draw.
    Log-probabilities are reported under the raw logits. Raises InvalidRequest for a value out of range.
    """

    temperature: float = option(1.0, *told("temperature"))
    top_p: float = option(1.0, *told("top_p"))
    top_k: int = option(0, *told("top_k"))
    min_p: float = option(0.0, *told("min_p"))
    repetition_penalty: float = option(1.0, *told("repetition_penalty"))
    presence_penalty: float = option(0.0, *told("presence_penalty"))
    frequency_penalty: float = option(0.0, *told("frequency_penalty"))
    logit_bias: Mapping[int, float] | None = option(None, *told("logit_bias"))
    seed: int | None = option(None, *told("seed"))
    stop: tuple[str, ...] = option((), *told("stop"))
    logprobs: int = option(0, *told("logprobs"))

    def __post_init__(self) -> None:
        number("temperature", self.temperature, 0.0, 2.0)
        number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        integer("top_k", self.top_k, 0)
        number("min_p", self.min_p, 0.0, 1.0, open_high=True)
        number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            integer("seed", self.seed, 0, 2**64 - 1)
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        kind("logit_bias", self.logit_bias, (Mapping, type(None)), "a mapping of token ids to numbers, or None")
        for token, bias in (self.logit_bias or {}).items():
            integer("logit_bias token id", token, 0, MAX_ID)
            number(f"logit_bias[{token}]", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def default_sampling(generation: Mapping[str, Any]) -> Sampling:
    """The sampling that a generation_config.json asks for; greedy where it says `do_sample: false`.

    Raises CheckpointError for values that cannot be honoured.
    """
    if generation.get("do_sample") is False:
        return Sampling(temperature=0.0)
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    try:
        return Sampling(**{name: generation[name] for name in fields if generation.get(name) is not None})
    except InvalidRequest as error:
        raise CheckpointError(f"generation_config.json: {error}; correct it there") from error


def _strings(name: str, value: object) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (tuple, list)) or not all(isinstance(v, str) and v for v in values):
        raise InvalidRequest(f"{name} must be a string or a list of non-empty strings, not {value!r:.200}")
    if len(values) > MAX_STOPS:
        raise InvalidRequest(f"{name} has {len(values)} strings, more than {MAX_STOPS}; give fewer")
    if (longest := max(map(len, values), default=0)) > MAX_STOP_CHARACTERS:
        raise InvalidRequest(
            f"{name} has a string of {longest} characters, more than {MAX_STOP_CHARACTERS}; shorten it"
        )
    return tuple(values)
