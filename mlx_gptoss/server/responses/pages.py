"""Lists of items, one page at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from ..errors import JsonResponse, dump_json, invalid_field


class PageFields(BaseModel):
    """The query of a list. after: the id of the item before the page."""

    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"
    after: Annotated[str, Field(max_length=1024)] | None = None


PageQuery = Annotated[PageFields, Query()]


def list_response(items: Mapping[str, bytes], query: PageFields) -> Response:
    """One page of items as an object of the type list. items: as JSON by their ids, oldest first.

    Raises ApiError if `after` is none of them.
    """
    ids = list(items) if query.order == "asc" else list(items)[::-1]
    if query.after is not None and query.after not in items:
        raise invalid_field("after", f"is {query.after!r:.100}, which is not an item of this list")
    start = 0 if query.after is None else ids.index(query.after) + 1
    page = ids[start : start + query.limit]
    ends = {
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
        "has_more": start + query.limit < len(ids),
    }
    data = b",".join(items[id] for id in page)
    content = b'{"object":"list","data":[' + data + b"]," + dump_json(ends)[1:]
    return Response(content, media_type=JsonResponse.media_type)
