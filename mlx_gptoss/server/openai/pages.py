"""Lists of items, one page at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from ..errors import invalid_field


def page_of(items: Mapping[str, bytes], limit: int, order: Literal["asc", "desc"], after: str | None) -> dict[str, Any]:
    """Up to `limit` items as an object of the type list. items: as JSON by their ids, oldest first.

    after: the id of the item before the page. Raises ApiError if there is no such item.
    """
    ids = list(items) if order == "asc" else list(items)[::-1]
    if after is not None and after not in items:
        raise invalid_field("after", f"is {after!r:.100}, which is not an item of this list")
    start = 0 if after is None else ids.index(after) + 1
    page = ids[start : start + limit]
    return {
        "object": "list",
        "data": [json.loads(items[id]) for id in page],
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
        "has_more": start + limit < len(ids),
    }
