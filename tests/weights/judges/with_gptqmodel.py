"""gptqmodel"""
from . import base

NAME = "gptqmodel"
ROWS = ()


def version():
    return None
