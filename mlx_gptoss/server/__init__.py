"""OpenAI-compatible HTTP server for one loaded model. Start reading at app.py. Needs the `serve` extra."""
