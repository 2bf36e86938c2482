"""The queue of a request's events. The Python API has the same one, so it is in chat/."""

from __future__ import annotations

from ..chat.event_queue import EventQueue

__all__ = ["EventQueue"]
