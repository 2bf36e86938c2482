"""How to choose tokens, as options of generate(): a Sampling, or its fields by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest
from . import check
from .declare import Flag, option

if TYPE_CHECKING:
    from ..sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The fields have the names and texts of Sampling's; None leaves one as the model has it."""

    sampling: Sampling | None = option(
        None,
        "How to choose tokens. Default: as the checkpoint's generation_config.json says; for gpt-oss, temperature 1. "
        "Instead of it, its fields can be given by name; those left out are the model's.",
    )
    temperature: float | None = option(
        None, "0 to 2; 0 always takes the likeliest token. Default: the model's own, 1 for gpt-oss.", Flag("T")
    )
    top_p: float | None = option(
        None, "Keep the smallest set of likeliest tokens whose probabilities add up to top_p, above 0 to 1.", Flag("P")
    )
    top_k: int | None = option(None, "Keep the k likeliest tokens; 0 keeps all.", Flag("K"))
    min_p: float | None = option(
        None, "Drop tokens less likely than min_p times the likeliest, 0 to below 1.", Flag("P")
    )
    repetition_penalty: float | None = option(
        None,
        "Positive logits of tokens in prompt or output are divided by it, negative ones multiplied (Keskar et al. "
        "2019); above 0 to 10, 1 is off.",
    )
    presence_penalty: float | None = option(None, "Subtracted once from the logits of tokens in the output, -2 to 2.")
    frequency_penalty: float | None = option(None, "Subtracted for each occurrence of a token in the output, -2 to 2.")
    logit_bias: Mapping[int, float] | None = option(None, "Token id to addend, -100 to 100.")
    seed: int | None = option(
        None, "The same seed gives the same text, whatever runs at the same time. Default: a new one.", Flag("S")
    )
    stop: str | Sequence[str] | None = option(
        None,
        "Up to 16 strings of at most 1024 characters that end the text and are not part of it.",
        Flag("TEXT", repeatable=True),
    )
    logprobs: int | None = option(None, "Report this many likeliest alternatives per token, 0 to 20.")

    def __post_init__(self) -> None:
        """Raise InvalidRequest for values of the wrong type or out of range, and for a Sampling given with fields."""
        from ..sampling import Sampling  # which imports this module

        check.kind("sampling", self.sampling, (Sampling, type(None)), "a Sampling or None")
        given = self._given()
        if given and self.sampling is not None:
            names = ", ".join(given)
            raise InvalidRequest(f"sampling and {names} are both given: set {names} in the Sampling, or leave it out")
        Sampling(**given)

    def resolve(self, default: Sampling) -> Sampling:
        """The sampling to use: the one given, or `default` with the fields that are given."""
        return self.sampling or replace(default, **self._given())

    def _given(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(SamplingOptions) if each.name != "sampling"}
        return {name: value for name, value in values.items() if value is not None}


def told(name: str) -> tuple[str, Flag | None]:
    """The help text and the flag of a field, for Sampling's field of that name."""
    (declared,) = (each for each in fields(SamplingOptions) if each.name == name)
    return declared.metadata["help"], declared.metadata["flag"]
