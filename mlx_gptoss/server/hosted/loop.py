"""One response with tools that the server runs: replies and results in turns, until the model answers."""
