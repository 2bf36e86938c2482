"""Checkpoints: every published format in and out, in numpy alone. Nothing here knows a device.

Read tensor.py first (what a weight is), then params.py (what there is of them), formats/base.py and checkpoint.py.
"""
