"""modelopt"""
from . import base

NAME = "modelopt"
ROWS = ()


def version():
    return None
