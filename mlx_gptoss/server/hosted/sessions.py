"""The state of the tools: one HostedTools for the server, one Session for a conversation."""
