"""What waits: its order, its bounds, what is dropped first; and frames, in whatever pieces they come."""

import pytest

from core.events import Usage
from servers.drafts import Draft
from servers.store import messages
from servers.store import outbox as module
from servers.store.filters import Filters
from servers.store.messages import Batch, Config, Delete, Done, Frames, Item, Sync
from servers.store.outbox import Outbox, Parcel
from servers.store.packed import Packed
from tests.servers.drafts import draft, read


def batches(box: Outbox) -> list[Item]:
    return [item.batch() if isinstance(item, Packed) else item for item in parcels(box)]


def parcels(box: Outbox) -> list[Parcel]:
    found = []
    while (item := box.next()) is not None:
        found.append(item)
    return found


def test_batches_are_bounded_and_in_order_and_things_go_with_them() -> None:
    box = Outbox()
    made = [draft(number) for number in range(module.BATCH_MAX + 3)]
    for one in made:
        box.put(one)
    box.put_thing("key", "1", b"old")
    box.put_thing("key", "1", None)
    first, second = batches(box)
    assert isinstance(first, Batch)
    assert isinstance(second, Batch)
    assert [*first.drafts, *second.drafts] == [read(one) for one in made]
    assert (first.things, second.things) == ([("key", "1", None)], [])
    assert (first.number, second.number) == (1, 2)


def test_many_bytes_make_a_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_MAX_BYTES", 100)
    box = Outbox()
    for size in (10, 10, 500, 10):
        box.put(draft(body=b"x" * size))
    assert [len(item.drafts) for item in batches(box) if isinstance(item, Batch)] == [2, 1, 1]


def test_bodies_are_dropped_first_then_records_and_both_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECORDS_MAX", 3)
    monkeypatch.setattr(module, "PENDING_MAX_BYTES", 20)
    box = Outbox()
    made = [draft(number) for number in range(5)]
    for one in made:
        box.put(one)
    assert (box.written.bodies_dropped, box.written.records_dropped) == (2, 2)
    (batch,) = batches(box)
    assert isinstance(batch, Batch)
    assert [one.finished().bodies for one in batch.drafts] == ["whole", "dropped", "dropped"]
    box.put(draft(6))  # what was sent and not confirmed still counts
    assert box.written.records_dropped == 3
    box.confirmed(Done(batch.number, 2, 1))
    assert (box.written.records, box.written.records_dropped) == (2, 4)
    box.put(draft(7))
    assert (box.written.bodies_dropped, box.written.records_dropped) == (2, 4)


def test_what_is_asked_comes_after_what_was_put() -> None:
    box = Outbox()
    number = box.ask(Sync)
    box.put(draft())
    batch, asked = batches(box)
    assert (isinstance(batch, Batch), asked) == (True, Sync(number))
    assert box.next() is None


def test_what_nobody_confirmed_comes_again_first_and_in_order() -> None:
    box = Outbox()
    sent = []
    for number in range(4):
        box.put(draft(number))
        sent.append(box.next())
    numbers = {item.number for item in sent if item is not None}
    box.put(draft(4))
    box.confirmed(Done(2, 1))
    box.again(numbers)
    again = parcels(box)
    assert again[:3] == [sent[0], sent[2], sent[3]]
    assert len(again) == 4
    assert not box.is_empty
    box.give_up()
    assert (box.written.records, box.written.records_dropped, box.is_empty) == (1, 4, True)


def test_no_draft_spoils_a_batch() -> None:
    made = [draft(0), draft(1, model="half a \ud800", usage=Usage(prompt_tokens=2**70)), draft(2)]
    batch = packed(7, made, [("key", "1", b"x")]).batch()
    assert (batch.number, batch.count, batch.things) == (7, 3, [("key", "1", b"x")])
    assert batch.drafts == [read(made[0]), batch.drafts[1], read(made[2])]
    assert (batch.drafts[1].record.model, batch.drafts[1].finished().prompt_tokens) == ("half a ?", 2**63 - 1)


def packed(number: int, drafts: list[Draft], things: list[tuple[str, str, bytes | None]]) -> Packed:
    found = Packed()
    for one in drafts:
        found.add(one, 3)
    found.close(number, things)
    assert (found.number, found.drafts, found.size_bytes) == (number, len(drafts), 3 * len(drafts))
    return found


@pytest.mark.parametrize("size", [1, 3, 7, 10**6])
def test_frames_come_out_as_they_went_in(size: int) -> None:
    config = Config(url="sqlite://", coordinator_id="c", retention_days=7, max_bytes=5, bodies="full", body_max_bytes=1)
    batch = packed(1, [draft(), draft(1)], [("key", "n", b"x"), ("key", "m", None)])
    asked = [Delete(2, Filters(q="é")), Sync(3)]
    data = b"".join([messages.framed(config), batch.frame, *map(messages.framed, asked)])
    frames = Frames()
    first, *rest = [frame for at in range(0, len(data), size) for frame in frames.take(data[at : at + size])]
    assert messages.config_of(first) == config
    assert [messages.item_of(frame) for frame in rest] == [batch.batch(), *asked]
    words: list[messages.Word] = [Done(1, 2, 3, 4, "why"), messages.Ready(), messages.Said("info", "x", {"a": 1})]
    assert [messages.word_of(bytes(messages.framed(word)[messages.LENGTH_BYTES :])) for word in words] == words
