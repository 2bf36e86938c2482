"""Several processes that run one model together: how they find each other, stay in step, and end together.

The engine runs on rank 0 alone. Behind the seam of backends/base.py stands a GroupRunner there, which tells every call
to the other ranks before it makes it itself; they do nothing but follow. What is computed goes through the backend's
own collectives; here go a few hundred bytes a step, as lines of JSON.
"""

from __future__ import annotations

from .follower import Follower
from .launch import Launch, find_launch
from .leader import Leader

__all__ = ["Follower", "Launch", "Leader", "find_launch"]
