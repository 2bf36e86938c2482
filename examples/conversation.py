"""A conversation of several turns; each reply brings the conversation with itself appended."""

import mlx_gptoss

with mlx_gptoss.load() as model:
    reply = model.generate("What is 100 + 23?", system="You are a helpful assistant.")
    print(reply.text)
    for question in ("Add 5 to that.", "Reverse the word apple."):
        reply = model.generate(reply.conversation.with_user(question))
        print(reply.text)
