"""Several processes (ranks) that run one model together: how they connect, stay in step and end together.

The engine runs on rank 0 alone. Its runner is a GroupRunner, which sends every call to the other ranks before making
it locally; the other ranks only execute these calls. Tensors go through the backend's own collectives. The connections
here carry a few hundred bytes a step, as lines of JSON.
"""

from __future__ import annotations

from .follower import Follower
from .launch import Launch, find_launch
from .leader import Leader

__all__ = ["Follower", "Launch", "Leader", "find_launch"]
