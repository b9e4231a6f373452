"""A real PostgreSQL for tests, from Debian's package, on a private socket in a directory that goes away.

PostgreSQL refuses to run as root: where the tests do, it runs as an unprivileged user.
Invariant: it has ended when `Postgres.stop` returns.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import quote

LIMIT_S = 60.0
USERS = ("postgres", "nobody")
PLACES = ("/usr/lib/postgresql", "/usr/local/pgsql", "/opt/homebrew/opt/postgresql")


def program(name: str) -> str:
    """Where a program of the server lies; the newest version of Debian's package, else on the path."""
    for place in map(Path, PLACES):
        found = sorted(place.glob(f"*/bin/{name}"), key=lambda path: [int(part) for part in path.parts if part.isdigit()])
        if found:
            return str(found[-1])
    on_path = shutil.which(name)
    assert on_path is not None, f"{name} is not here: install PostgreSQL (on Debian: apt-get install postgresql)"
    return on_path


class Postgres:
    """One server; `start` and `stop` may follow each other."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
        self._user: str | None = None
        if os.getuid() == 0:
            account = next(pwd.getpwnam(name) for name in USERS if _exists(name))
            self._user = account.pw_name
            os.chown(self.directory, account.pw_uid, account.pw_gid)
        self._data = self.directory / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-D", str(self._data), "-U", "router", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")

    def url(self, database: str = "postgres") -> str:
        """For `DATABASE_URL`."""
        return f"postgresql://router@/{database}?host={quote(str(self.directory), safe='')}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = f"-c listen_addresses= -c unix_socket_directories={self.directory} -c fsync=off -c max_connections=100"
        self._run("pg_ctl", "-D", str(self._data), "-w", "-t", str(int(LIMIT_S)), "-l", str(self.directory / "log"), "-o", options, "start")

    def stop(self, how: str = "fast") -> None:
        """Stop it and wait until it is gone; `immediate` is a crash."""
        if (self._data / "postmaster.pid").exists():
            self._run("pg_ctl", "-D", str(self._data), "-w", "-m", how, "stop")

    def create(self, database: str) -> str:
        """A new database; returns its URL."""
        self._run("createdb", "-h", str(self.directory), "-U", "router", database)
        return self.url(database)

    def close(self) -> None:
        """Stop it and remove everything."""
        self.stop("immediate")
        shutil.rmtree(self.directory, ignore_errors=True)

    def pause(self) -> None:
        """Let it hang: it takes connections and says nothing."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        os.kill(int((self._data / "postmaster.pid").read_text().splitlines()[0]), number)

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [program(name), *arguments], user=self._user, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=LIMIT_S, cwd="/"
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
