"""torchao"""
from . import base

NAME = "torchao"
ROWS = ()


def version():
    return None
