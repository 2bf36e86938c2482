"""OpenAI's Harmony format: what a conversation is, how it becomes ids, and how the model's ids become messages."""
