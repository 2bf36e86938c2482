"""OpenAI's HTTP interface to one loaded model. Read app.py first; needs the extra `serve`."""
