"""Many nodes seen as one Ollama."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import fleet, names
from core.fleet import NodeInventory
from core.units import AgentId


def row(name: str, digest: str = "d1", modified_at: str = "2026-05-04T17:37:44.706015396-07:00", **more: Any) -> dict[str, Any]:
    return {"name": name, "model": name, "modified_at": modified_at, "size": 100, "digest": digest, "details": {}, **more}


def ps(
    name: str, digest: str = "d1", expires_at: str = "2026-08-21T03:05:00Z", size: Any = 10, vram: Any = 10, context: Any = 4096
) -> dict[str, Any]:
    return {
        "name": name, "model": name, "size": size, "digest": digest, "details": {}, "expires_at": expires_at, "size_vram": vram,
        "context_length": context,
    }  # fmt: skip


def node(agent_id: str, installed: list[Any] | None = None, loaded: list[Any] | None = None, **more: Any) -> NodeInventory:
    more.setdefault("ready", True)
    return NodeInventory(agent_id=AgentId(agent_id), name=agent_id, installed=installed or [], loaded=loaded or [], **more)


# ---------------------------------------------------------------- tags


def test_a_row_is_handed_on_untouched() -> None:
    only = row("llama3:latest", capabilities=["completion"], unknown={"later": 1})
    assert fleet.merged_tags([node("a", [only]), node("b", [row("llama3:latest", modified_at="2020-01-01T00:00:00Z")])])[0] is only


def test_no_nodes_no_models() -> None:
    assert fleet.merged_tags([]) == []
    assert fleet.merged_ps([]) == []
    assert fleet.merged_v1_models([]) is None


def test_a_node_that_is_not_ready_does_not_count() -> None:
    away = node("a", [row("x")], [ps("x")], ready=False, version="0.1.0")
    assert fleet.merged_tags([away]) == []
    assert fleet.merged_ps([away]) == []
    assert fleet.lowest_version([away], "1.2.3") == "1.2.3"
    assert fleet.canonical_digests([away]) == {}


def test_newest_first_whatever_the_offset() -> None:
    rows = [
        row("old", modified_at="2026-01-01T00:00:00Z"),
        row("new", modified_at="2026-01-01T23:00:00-09:00"),
        row("mid", modified_at="2026-01-02T07:00:00+00:00"),
    ]
    assert [found["name"] for found in fleet.merged_tags([node("a", rows)])] == ["new", "mid", "old"]


def test_the_digest_of_most_nodes_wins_over_the_newest() -> None:
    nodes = [
        node("a", [row("x", "old")]),
        node("b", [row("x", "old")]),
        node("c", [row("x", "new", modified_at="2027-01-01T00:00:00Z")]),
    ]
    assert [found["digest"] for found in fleet.merged_tags(nodes)] == ["old"]
    (drift,) = fleet.drift(nodes)
    assert (drift.model, drift.canonical) == ("x:latest", "old")
    assert drift.digests == [("a", "old"), ("b", "old"), ("c", "new")]


def test_among_equals_the_newest_then_the_smallest_digest() -> None:
    newer = [node("a", [row("x", "d1")]), node("b", [row("x", "d2", modified_at="2027-01-01T00:00:00Z")])]
    assert fleet.merged_tags(newer)[0]["digest"] == "d2"
    equal = [node("a", [row("x", "d2")]), node("b", [row("x", "d1")])]
    assert fleet.merged_tags(equal)[0]["digest"] == "d1"
    assert fleet.canonical_digests(equal) == {names.normalise("x"): "d1"}


def test_modified_at_is_the_newest_of_the_canonical_holders() -> None:
    nodes = [
        node("a", [row("x", "d1", modified_at="2026-01-01T00:00:00Z")]),
        node("b", [row("x", "d1", modified_at="2026-03-01T00:00:00Z")]),
        node("c", [row("x", "d2", modified_at="2026-09-01T00:00:00Z")]),
    ]
    assert fleet.merged_tags(nodes)[0]["modified_at"] == "2026-03-01T00:00:00Z"


def test_one_model_under_two_spellings_is_one_row() -> None:
    assert len(fleet.merged_tags([node("a", [row("Foo:Q4")]), node("b", [row("foo:q4")]), node("c", [row("library/foo:q4")])])) == 1
    assert len(fleet.merged_tags([node("a", [row("Foo:Q4"), row("foo:q4", "other")])])) == 1


def test_cloud_models_show_only_when_allowed() -> None:
    rows = [row("a:120b-cloud"), row("b:cloud"), row("stub", remote_host="https://ollama.com"), row("mine")]
    assert [found["name"] for found in fleet.merged_tags([node("a", rows)])] == ["mine"]
    assert len(fleet.merged_tags([node("a", rows)], cloud=True)) == 4
    assert fleet.merged_v1_models([node("a", rows[:2])]) is None


def test_bare_names_of_older_agents_count() -> None:
    assert fleet.merged_tags([node("a", ["Llama3"])]) == [{"name": "llama3:latest", "model": "llama3:latest"}]
    assert fleet.merged_ps([node("a", [], ["llama3"])]) == [{"name": "llama3:latest", "model": "llama3:latest"}]


def test_nonsense_from_a_node_is_left_out() -> None:
    rows: list[Any] = [
        None,
        7,
        {},
        {"name": 5},
        {"name": "not a name"},
        {"name": None, "model": "by-model"},
        [],
        row("good", modified_at="yesterday"),
    ]
    nodes = [node("a", rows, rows), node("b", [row("good", digest=9, modified_at=3)])]  # type: ignore[arg-type]
    assert {found.get("name") or found["model"] for found in fleet.merged_tags(nodes)} == {"good", "by-model"}
    assert len(fleet.merged_ps(nodes)) == 2


# ---------------------------------------------------------------- ps


def test_loaded_twice_is_one_row_with_sums() -> None:
    nodes = [
        node("a", loaded=[ps("x", size=10, vram=4, expires_at="2026-08-21T03:05:00Z", context=8192)]),
        node("b", loaded=[ps("x", size=20, vram=20, expires_at="2026-08-21T03:06:00Z", context=4096)]),
    ]
    (merged,) = fleet.merged_ps(nodes)
    assert (merged["size"], merged["size_vram"], merged["expires_at"], merged["context_length"]) == (30, 24, "2026-08-21T03:06:00Z", 4096)
    assert nodes[1].loaded[0]["size"] == 20, "the node's own row is left as it was"


def test_of_two_digests_the_canonical_one_is_shown() -> None:
    installed = [row("x", "new")]
    nodes = [node("a", installed, [ps("x", "old")]), node("b", installed, [ps("x", "new")])]
    assert [found["digest"] for found in fleet.merged_ps(nodes)] == ["new"]
    nodes = [node("a", installed, [ps("x", "old", expires_at="2026-01-01T00:00:00Z"), ps("x", "older")])]
    assert [found["digest"] for found in fleet.merged_ps(nodes)] == ["older"], "neither is installed: the one that stays longer"


def test_the_last_to_expire_comes_first() -> None:
    loaded = [ps("x", expires_at="2026-08-21T03:05:00Z"), ps("y", expires_at="2319-01-01T00:00:00Z"), ps("z", expires_at="gone")]
    assert [found["name"] for found in fleet.merged_ps([node("a", loaded=loaded)])] == ["y", "x", "z"]


def test_odd_numbers_do_not_break_the_sum() -> None:
    nodes = [node("a", loaded=[ps("x", size="big", context=None)]), node("b", loaded=[ps("x", size=5, context="long")])]
    (merged,) = fleet.merged_ps(nodes)
    assert merged["size"] == 5


# ---------------------------------------------------------------- v1, version


def test_v1_models_in_openais_form() -> None:
    rows = [row("llama3.2:latest", modified_at="2025-05-05T00:37:44.7Z"), row("Me/nano:v1", modified_at="?")]
    assert fleet.merged_v1_models([node("a", rows)]) == [
        {"id": "llama3.2:latest", "object": "model", "created": 1746405464, "owned_by": "library"},
        {"id": "Me/nano:v1", "object": "model", "created": 0, "owned_by": "Me"},
    ]
    assert fleet.v1_model({}) == {"id": "", "object": "model", "created": 0, "owned_by": "library"}


def test_a_time_without_zone_is_utc() -> None:
    assert fleet.v1_model(row("x", modified_at="1970-01-01T00:00:05"))["created"] == 5


@pytest.mark.parametrize(
    ("versions", "lowest"),
    [
        (["0.33.0", "0.9.7"], "0.9.7"),
        (["0.33.0-rc2"], "0.33.0"),
        (["v0.12.1+build", "0.13.0"], "0.12.1"),
        (["", "unknown", "0.5"], "0.5"),
        ([], "0.0.1"),
        (["9" * 5000], "0.0.1"),
    ],
)
def test_the_fleet_promises_its_lowest_version(versions: list[str], lowest: str) -> None:
    nodes = [node(str(number), version=version) for number, version in enumerate(versions)]
    assert fleet.lowest_version(nodes, "0.0.1") == lowest


# ---------------------------------------------------------------- properties

model_names = st.sampled_from(["llama3", "Llama3:latest", "library/llama3", "me/nano:v1", "hf.co/a/b:Q4", "gpt:8b-cloud", "bad name"])
times = st.sampled_from(["2026-05-04T17:37:44.7-07:00", "2026-05-05T00:37:44.7Z", "2025-01-01T00:00:00Z", "nonsense", None])
tag_rows = st.builds(lambda name, digest, at: row(name, digest, at), model_names, st.sampled_from(["d1", "d2", "d3", None]), times)
ps_rows = st.builds(lambda name, digest, at: ps(name, digest, at), model_names, st.sampled_from(["d1", "d2"]), times)
fleets = st.lists(
    st.tuples(st.lists(tag_rows, max_size=4), st.lists(ps_rows, max_size=4), st.booleans(), st.sampled_from(["0.9.1", "0.12.0", "x"])),
    max_size=5,
).map(lambda found: [node(f"n{i}", tags, loaded, ready=ready, version=version) for i, (tags, loaded, ready, version) in enumerate(found)])


@given(fleets, st.randoms(use_true_random=False))
def test_order_of_nodes_changes_nothing(nodes: list[NodeInventory], shuffler: random.Random) -> None:
    shuffled = nodes.copy()
    shuffler.shuffle(shuffled)
    for view in (fleet.merged_tags, fleet.merged_ps, fleet.merged_v1_models, fleet.drift):
        assert view(nodes) == view(shuffled)
    assert fleet.lowest_version(nodes, "") == fleet.lowest_version(shuffled, "")


@given(fleets)
def test_one_row_per_model_and_each_is_some_nodes_own(nodes: list[NodeInventory]) -> None:
    rows = fleet.merged_tags(nodes, cloud=True)
    keys = [names.normalise(found["name"]) for found in rows]
    assert len(keys) == len(set(keys))
    ready = [found for each in nodes if each.ready for found in each.installed if names.key_or_none(found["name"])]
    assert all(any(found is own for own in ready) for found in rows)
    assert set(keys) == {names.normalise(found["name"]) for found in ready}
    assert {fleet._digest(found) for found in rows} <= set(fleet.canonical_digests(nodes).values())


@given(fleets)
def test_ps_has_one_row_per_model_and_loses_no_memory_of_its_digest(nodes: list[NodeInventory]) -> None:
    rows = fleet.merged_ps(nodes)
    keys = [names.normalise(found["name"]) for found in rows]
    assert len(keys) == len(set(keys))
    for key, found in zip(keys, rows, strict=True):
        same = [
            own for each in nodes if each.ready for own in each.loaded
            if names.key_or_none(own["name"]) == key and own["digest"] == found["digest"]
        ]  # fmt: skip
        assert found["size"] == 10 * len(same)


@given(fleets)
def test_drift_names_exactly_the_names_with_two_digests(nodes: list[NodeInventory]) -> None:
    found = {drift.model: drift for drift in fleet.drift(nodes)}
    for drift in found.values():
        assert len({digest for _, digest in drift.digests}) > 1
        assert drift.canonical in {digest for _, digest in drift.digests}
        assert len({agent_id for agent_id, _ in drift.digests}) == len(drift.digests)


# ---------------------------------------------------------------- kept up to date in steps

HOLDINGS = st.lists(
    st.sampled_from([row("x"), row("x", "d2"), row("y", modified_at="2020-01-01T00:00:00Z"), row("z:cloud"), "bare", {"name": 5}])
)


@given(st.lists(st.tuples(st.sampled_from("abc"), HOLDINGS, st.booleans(), st.integers(0, 3)), max_size=8))
def test_the_index_shows_what_a_merge_from_nothing_shows_also_after_updates_that_were_broken_off(
    story: list[tuple[str, list[Any], bool, int]],
) -> None:
    index = fleet.TagsIndex()
    nodes: dict[str, NodeInventory] = {}
    for name, rows, ready, broken_after in story:
        nodes[name] = node(name, list(rows), ready=ready)
        for _ in zip(range(broken_after), index.update(list(nodes.values())), strict=False):
            pass
        nodes[name] = node(name, list(rows), ready=ready)
        list(index.update(list(nodes.values())))
        assert not index.differs(list(nodes.values()))
        assert [row for _, row in index.rows] == fleet.merged_tags(list(nodes.values()))
        assert index.canonical == fleet.canonical_digests(list(nodes.values()))


def test_an_update_costs_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "STEP_ROWS", 10)
    many = [node(f"n{number:02}", [row(f"m{at}") for at in range(40)]) for number in range(20)]
    index = fleet.TagsIndex()
    assert index.differs(many)
    assert len(list(index.update(many))) >= 80
    assert list(index.update(many)) == []
    changed = [*many[:-1], node(many[-1].agent_id, [row("new")])]
    assert index.differs(changed)
    assert 40 <= len(list(index.update(changed))) <= 90
    assert fleet.merged_ps([node("a", [row("x", "d2")], [ps("x", "d2"), ps("x", "d3")])], {names.normalise("x"): "d3"})[0]["digest"] == "d3"
