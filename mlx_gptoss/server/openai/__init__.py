"""OpenAI's endpoints: chat completions, responses and completions."""
