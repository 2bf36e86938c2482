"""The store of responses: eviction order and limits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_gptoss.harmony.messages import Message
from mlx_gptoss.server.openai.conversation_items import ConversationItems
from mlx_gptoss.server.openai.store import ConversationStore, ResponseStore, StoredConversation, StoredResponse


def stored(text, **items):
    return StoredResponse(b"{}", items, {}, ConversationItems((Message("user", text),)))


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


@given(
    st.lists(st.tuples(st.sampled_from(["put", "delete"]), st.sampled_from("abcdef"), st.sets(st.sampled_from("xyz"))))
)
def test_items_are_found_while_a_response_holds_them(steps):
    store, held = ResponseStore(max_responses=3), {}
    for operation, id, items in steps:
        if operation == "put":
            store.put(id, stored(id, **{item: f"{item} of {id}".encode() for item in items}))
            held.pop(id, None)
            held[id] = items
        else:
            store.delete(id)
        held = {key: value for key, value in held.items() if key in store._entries}
        for item in "xyz":
            holders = [key for key, value in held.items() if item in value]
            found = store.item(item)
            assert (found is None) == (not holders)
            assert found is None or found.decode().removeprefix(f"{item} of ") in holders
    assert set(store._holders) == {item for items in held.values() for item in items}


def test_conversations_grow_and_are_limited():
    store = ConversationStore(max_conversations=2, max_bytes=2000)
    store.put("a", StoredConversation(0))
    assert store.append("a", {"x": b"1"}) and store.append("a", {"y": b"2"})
    assert list(store.get("a").items.values()) == [b"1", b"2"] and store.item("y") == b"2"
    assert not store.append("a", {"z": b"3" * 2000}) and list(store.get("a").items) == ["x", "y"]
    assert not store.append("b", {"x": b"1"})
