"""OpenAI's Harmony chat format: conversations as data, rendering to token ids, parsing of token ids, and guided output.

README.md in this folder describes the format and the files.
"""
