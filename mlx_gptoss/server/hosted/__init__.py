"""gpt-oss's own tools, run by the server: browser, python, and the tools of MCP servers. Off by default.

How an endpoint uses it, with `hosted: HostedTools` (sessions.py) in place of None:

1. `selection = hosted_tools_of(body.tools, hosted.settings)` (selection.py) says which of a request's tools are served
   here, which are the client's (`selection.client_tools`), and which are left out (`selection.left_out`, to be named).
2. If `selection` is not empty: `session = await hosted.session(selection, previous=...)` (sessions.py), one per
   conversation; `conversation = session.declare(conversation)` adds the declarations.
3. `queue = await HostedReply.start(service, session, conversation, reply, max_tool_calls=...)` (loop.py) takes the
   place of `await service.start(reply)`. It has the methods of an EventQueue: batches(), stop(), close(); its events
   are those of chat/reply.py and of events.py. Pass it to service.finish() in the end.
4. `hosted_item(...)` (items.py) turns the events into items of the Responses API.
5. `hosted.keep(response_id, session)` lets `previous=response_id` find the session again.
"""
