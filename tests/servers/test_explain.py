"""The line that explains a choice."""

from core.units import AgentId, Micros, RequestId
from core.views import Candidate, Decision, Explanation
from servers.explain import CANDIDATES_SHOWN, LINE_MAX, line


def explained(count: int, out: dict[str, str]) -> Explanation:
    candidates = [
        Candidate(agent_id=AgentId(str(index)), name=f"n{index}", score=Micros(index), parts={"work": index}, chosen=index == count - 1)
        for index in range(count)
    ]
    decision = Decision(after_ms=1.4, outcome="forwarded", candidates=candidates, out=out)
    return Explanation(request_id=RequestId("r"), model="m", strategy="auto", decisions=[decision])


def test_the_chosen_one_comes_first_and_the_others_after_it() -> None:
    assert line(explained(2, {"n9": "is offline"})) == (
        "auto, forwarded after 1 ms; n1 (chosen): 1 = work 1; n0: 0 = work 0; not n9: is offline"
    )


def test_it_is_short_however_much_there_is_to_tell() -> None:
    told = line(explained(100, {f"out{index}": "because of this" for index in range(100)}))
    assert len(told) == LINE_MAX
    assert told.count("work") == CANDIDATES_SHOWN


def test_without_a_decision_there_is_the_strategy() -> None:
    assert line(Explanation(request_id=RequestId("r"), model=None, strategy="metrics", decisions=[])) == "metrics"
