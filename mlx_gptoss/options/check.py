"""Checks of option values. An error names the option, the value and what is allowed."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidRequest


def number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise InvalidRequest unless the value is an int or float in the range; NaN is in none. Open ends are left out."""
    ok = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (low < value if open_low else low <= value)
        and (value < high if open_high else value <= high)
    )
    if not ok:
        span = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise InvalidRequest(f"{name} must be a number in {span}, not {shown(value)}")


def integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise InvalidRequest unless the value is an int in the range; True and False are none."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not ok:
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidRequest(f"{name} must be an integer {span}, not {shown(value)}")


def kind(name: str, value: object, kinds: type | tuple[type, ...], allowed: str) -> None:
    """Raise InvalidRequest unless the value is of one of the types. allowed: what they are, in words."""
    if not isinstance(value, kinds):
        raise InvalidRequest(f"{name} must be {allowed}, not {shown(value)}")


def name_or_none(name: str, value: object) -> None:
    """Raise InvalidRequest unless the value is None or a string that is not empty."""
    if value is not None and (not isinstance(value, str) or not value):
        raise InvalidRequest(f"{name} must be a name or None, not {shown(value)}")


def one_of(name: str, value: object, choices: tuple[str | int, ...]) -> None:
    """Raise InvalidRequest unless the value is one of the choices, of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise InvalidRequest(f"{name} must be {' or '.join(map(repr, choices))}, not {shown(value)}")


def shown(value: Any) -> str:
    """Return a value as an error shows it: its repr, at most 80 characters."""
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python writes, a list within itself, any object
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
