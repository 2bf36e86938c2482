"""The store of responses: eviction order and limits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_gptoss.harmony.messages import Message
from mlx_gptoss.server.openai.items import ConversationItems
from mlx_gptoss.server.openai.store import ResponseStore, StoredResponse


def stored(text):
    return StoredResponse(b"{}", b"[]", ConversationItems((Message("user", text),)))


def test_least_recently_used_response_is_evicted():
    store = ResponseStore(max_responses=2)
    for id in "ab":
        store.put(id, stored(id))
    assert store.get("a") is not None
    store.put("c", stored("c"))
    assert (store.get("b"), len(store)) == (None, 2)
    assert store.get("a") is not None and store.get("c") is not None


def test_response_larger_than_the_store_is_not_stored_and_evicts_nothing():
    store = ResponseStore(max_bytes=2000)
    assert store.put("a", stored("a"))
    assert not store.put("b", stored("b" * 2000))
    assert store.get("a") is not None and store.get("b") is None


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "delete"]), st.sampled_from("abcdef"), st.integers(0, 600))))
def test_limits_hold_for_any_sequence_of_operations(steps):
    store, sizes = ResponseStore(max_responses=4, max_bytes=2000), {}
    for operation, id, length in steps:
        if operation == "put":
            store.put(id, stored("x" * length))
            sizes[id] = stored("x" * length).size()
        elif operation == "get":
            store.get(id)
        else:
            store.delete(id)
        assert len(store) <= 4 and store.bytes <= 2000
        assert store.bytes == sum(sizes[id] for id in "abcdef" if store.get(id) is not None)
