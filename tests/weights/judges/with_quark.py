"""quark"""
from . import base

NAME = "quark"
ROWS = ()


def version():
    return None
