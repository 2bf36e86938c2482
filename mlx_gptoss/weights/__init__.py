"""Checkpoints: reads and writes every published gpt-oss format, in numpy alone. Nothing here depends on a device.

Read tensor.py first (what a weight is), then params.py (which weights a model has), formats/base.py (what a format is)
and checkpoint.py (opening a checkpoint). codecs.py decodes, quantization.py encodes, convert.py writes a checkpoint.
"""
