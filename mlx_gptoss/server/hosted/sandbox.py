"""Sandboxes for the tool python: the command that starts a confined Python, and which of them works here.

Inside, only the Python installation and the system's libraries are visible, read-only; /mnt/data and /tmp are empty,
in memory and limited; there is no network and no other process. Code runs without privileges.
"""
