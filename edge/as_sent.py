"""A request as its node gets it where that is not as it came: another model named, a context length raised, a text added.

Decides which bytes that changes, and that a compressed body is sent decoded where something in it changes; never what is named or
raised. Costs nothing where nothing changes: then nobody asks here. Invariant: what has no place to be put in is sent as it came.
"""

from collections.abc import Sequence

import msgspec

from core.events import Route
from edge.body import Body, BodyBudget, inspect_async
from edge.facts import BodyFacts
from edge.form import read_form
from edge.splice import Patch, Patched, Places, find_places, text_value
from edge.wire import RequestHead
from edge.wire_heads import HeaderBlock
from edge.zstd import decoded, is_compressed

_CONTENT_TYPE = b"content-type"


class Sent(msgspec.Struct):
    """What a node is sent. `decoded` is closed by whoever asked for it."""

    head: RequestHead
    body: Body | Patched
    decoded: Body | None = None


async def read_facts(route: Route, head: RequestHead, body: Body, budget: BodyBudget) -> BodyFacts:
    """What any body says: a form, a compressed one, a large one. Raises HttpError 503."""
    content_type = head.fields.get(_CONTENT_TYPE, b"")
    if route is Route.V1_TRANSCRIPTIONS:
        return (await read_form(body, content_type, head.query))[0]
    if not is_compressed(route, head.fields):
        return await inspect_async(route, body, content_type=content_type)
    plain = await decoded(body, budget)
    if plain is None:
        return BodyFacts(problem="the request body is too large when it is decoded; send less")
    try:
        return await inspect_async(route, plain, content_type=content_type)
    finally:
        plain.close()


async def as_sent(
    route: Route,
    head: RequestHead,
    body: Body,
    budget: BodyBudget,
    *,
    model: str | None = None,
    raise_context: int | None = None,
    more: Sequence[Patch] = (),
) -> Sent:
    """The request with `model` named and the context length raised to `raise_context` (None: as it came), and `more` patches.

    Raises:
        HttpError: 503, there is no room for the decoded body now.
    """
    if route is Route.V1_MODEL:
        return Sent(_of_model(head, model) if model is not None else head, body)
    plain = await decoded(body, budget) if is_compressed(route, head.fields) else None
    if plain is not None:
        head = _without(head, b"content-encoding")
    try:
        source = body if plain is None else plain
        patches = list(more)
        if route is Route.V1_TRANSCRIPTIONS:
            _, span = await read_form(source, head.fields.get(_CONTENT_TYPE, b""), head.query)
            if span is not None and model is not None:
                patches.append(span.becomes(model.encode()))
        else:
            patches += _changes(await find_places(route, source), model, raise_context)
    except BaseException:
        if plain is not None:
            plain.close()
        raise
    return Sent(head, Patched(source, patches), plain)


def _changes(places: Places, model: str | None, raise_context: int | None) -> list[Patch]:
    patches = []
    if model is not None and places.model is not None:
        patches.append(places.model.becomes(text_value(model)))
    if raise_context is not None and places.num_ctx is not None:
        patches.append(places.num_ctx.becomes(b"%d" % raise_context))
    return patches


def _of_model(head: RequestHead, model: str) -> RequestHead:
    """`GET /v1/models/:model` for another model."""
    path = "/v1/models/" + model
    target = path.encode("ascii", "replace") + (b"?" + head.query if head.query else b"")
    return RequestHead((head.method, target, path, head.query, head.version), head.block, head.content_length, head.request_id)


def _without(head: RequestHead, name: bytes) -> RequestHead:
    """`head` without one of its headers."""
    headers = [header for header in head.headers if header[0].lower() != name]
    fields = {key: value for key, value in head.fields.items() if key != name}
    start = (head.method, head.target, head.path, head.query, head.version)
    return RequestHead(start, HeaderBlock(headers, fields), head.content_length, head.request_id)
