"""What one poll of the watch sets off. Deadlines, leaving and waits are tried by both roles' tests."""

import socket

from edge.wire_watch import Watch, WatchedSocket


def test_what_is_put_off_is_done_in_order_after_all_events_of_a_poll() -> None:
    watch = Watch()
    done: list[str] = []
    pairs = [socket.socketpair() for _ in range(3)]

    class Told(WatchedSocket):
        def on_left(self) -> None: ...

    def watched(name: str, sock: socket.socket) -> None:
        def settle() -> None:
            done.append(f"{name} is settled")

        def send() -> None:
            done.append(f"{name} is sent")
            watch.at_end.append(settle)

        def came() -> None:
            done.append(f"{name} came")
            watch.at_end.append(send)

        Told(sock, watch).eager = came

    try:
        for name, (_, far) in zip("abc", pairs, strict=True):
            watched(name, far)
        for near, _ in pairs:
            near.send(b"x")
        assert watch.poll() == 3
        assert done == [f"{name} {what}" for what in ("came", "is sent", "is settled") for name in "abc"]
        assert watch.poll() == 0
        assert len(done) == 9
    finally:
        for pair in pairs:
            for sock in pair:
                sock.close()
        watch._epoll.close()
