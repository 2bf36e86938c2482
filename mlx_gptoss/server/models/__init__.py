"""Several models behind one server, each in a process of its own.

A process gives its memory back for certain when it ends, and its crash touches no other model. The server's process
keeps what is light: the names, the sizes from the headers, the tokenizer.

- named.py: a model and its names in the API.
- remote.py: RemoteModel, used as a Model is. Its work is done by the model's process while there is one.
- process.py: one run of such a process, as the server sees it.
- worker.py: what the process does. messages.py: what the two say to each other.
- pool.py: when processes start and end: on request, when memory is short, after a time without requests.
- endpoints.py: the lists of models, and POST /models/load and /models/unload.
"""
