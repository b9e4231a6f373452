"""A node that spoils streams, to try the client with: by turns one just ends, one has an error, one skips a token, one is good."""

import socket
import sys


def line(number: int) -> bytes:
    text = b'{"message":{"role":"assistant","content":" %06d %016d"},"done":false}\n' % (number, 0)
    return b"%x\r\n%b\r\n" % (len(text), text)


def main() -> None:
    listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    streams = 0
    while True:
        conn, _ = listening.accept()
        with conn:
            asked = conn.recv(65536)
            if asked.startswith(b"GET"):
                conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                continue
            kind, streams = streams % 4, streams + 1
            numbers = [0, 1, 2, 3, 4] if kind < 2 else [0, 2, 3, 4, 5, 6, 7, 8, 9] if kind == 2 else list(range(9))
            said = b"".join(map(line, numbers))
            end = b'%x\r\n{"error":"broken"}\n\r\n' % 19 if kind == 1 else b'e\r\n{"done":true}\n\r\n0\r\n\r\n' if kind >= 2 else b""
            conn.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + said + end)


if __name__ == "__main__":
    main()
