"""The network: what is lost, doubled, late or cut, and that a healed one does none of it."""

import msgspec

from core.simulation.network import DOWN, UP, Network
from core.simulation.options import Options
from core.simulation.prng import Prng, Ratio

ALWAYS = Ratio(1, 1)


def network(**fields: object) -> Network:
    return Network(msgspec.structs.replace(Options(nodes=2, delay_s=0.01), **fields), Prng("net"))


def test_a_good_network_delivers_once_and_soon() -> None:
    arrivals = [network().datagram(0, UP, now=1.0) for _ in range(3)]
    assert all(len(arrival) == 1 and 1.0 <= arrival[0] < 1.5 for arrival in arrivals)


def test_messages_are_lost_doubled_and_overtaken() -> None:
    assert network(loss=ALWAYS).datagram(0, UP, now=0.0) == []
    first, second = network(duplicate=ALWAYS).datagram(0, DOWN, now=0.0)
    assert first < second
    world = network(reorder=ALWAYS)
    late = [world.datagram(0, UP, now=float(at))[0] for at in range(20)]
    assert late != sorted(late) or max(b - a for a, b in zip(range(20), late, strict=True)) > 0.5


def test_a_cut_loses_datagrams_and_holds_streams() -> None:
    world = network()
    world.cut(0, up=True, down=False, until=10.0)
    assert world.datagram(0, UP, now=1.0) == []
    assert len(world.datagram(0, DOWN, now=1.0)) == 1
    assert world.stream(0, UP, now=1.0, after=0.0) >= 10.0
    assert not world.reachable(0, now=1.0)
    assert world.reachable(1, now=1.0)
    assert world.reachable(0, now=10.0)
    world.cut(1, up=False, down=True, until=5.0)
    assert world.datagram(1, DOWN, now=1.0) == []


def test_bytes_of_a_connection_stay_in_order() -> None:
    world = network()
    after = 0.0
    for at in range(50):
        arrives = world.stream(0, UP, now=at / 1000, after=after)
        assert arrives >= after
        after = arrives


def test_a_clogged_link_is_slow() -> None:
    world = network()
    world.clog(0, until=100.0)
    assert max(world.datagram(0, UP, now=1.0)[0] - 1.0 for _ in range(20)) > 0.5


def test_a_healed_network_is_good_for_ever() -> None:
    world = network(loss=ALWAYS, duplicate=ALWAYS, reorder=ALWAYS)
    world.cut(0, up=True, down=True, until=99.0)
    world.heal(now=1.0)
    assert len(world.datagram(0, UP, now=1.0)) == 1


def test_links_have_dice_of_their_own() -> None:
    one, two = network(), network()
    for _ in range(5):
        one.datagram(1, UP, now=0.0)
    assert one.datagram(0, UP, now=0.0) == two.datagram(0, UP, now=0.0)
