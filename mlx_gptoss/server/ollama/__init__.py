"""Ollama's native API: chat, generate and the list of models, as lines of JSON."""
