"""A conversation in, events out: the one path that the Python API, the commands and the server share."""
