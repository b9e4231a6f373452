"""Views are what shells encode: whole, and nothing in them names an instant."""

import msgspec

from core import views
from core.events import Upstream
from core.units import AgentId, Micros, RequestId, UnixMs
from core.views import AgentView, Candidate, Decision, EjectionView, Explanation, Statistics, WaitingView

KINDS = (AgentView, Candidate, Decision, EjectionView, Explanation, Statistics, WaitingView)


def test_views_are_frozen_and_tell_no_instants() -> None:
    assert all(kind.__struct_config__.frozen for kind in KINDS)
    assert not hasattr(views, "Instant")


def test_an_explanation_survives_the_wire() -> None:
    candidate = Candidate(agent_id=AgentId("a"), name="a", score=Micros(5), parts={"work": 5}, chosen=True)
    decision = Decision(after_ms=0.0, outcome="forwarded", candidates=[candidate], out={"b": "is offline"})
    whole = Explanation(request_id=RequestId("r"), model="m", strategy="auto", decisions=[decision])
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Explanation) == whole


def test_an_agent_needs_only_what_is_always_known() -> None:
    view = AgentView(
        id=AgentId("a"), name="a", machine_name="a", ip_address="10.0.0.1", ollama_version="", ollama_port=1,
        upstream=Upstream(host="10.0.0.1", port=1), status="offline", state="offline", registered_at=UnixMs(0), last_seen=None, slots=1,
    )  # fmt: skip
    assert (view.ejections, view.tags, view.in_flight, view.cpu_usage) == ([], [], 0, None)
