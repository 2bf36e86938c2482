"""The Responses API: requests, items, responses in progress, and what the server keeps of them."""
