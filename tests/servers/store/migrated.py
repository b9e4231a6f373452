"""A database file with this program's tables in it, as every start but the first finds one; to make them takes four times as long.

Knows where the default `DATABASE_URL` lies. Invariant: the file is what `open_engine` makes; the first start has tests of its own.
"""

import functools
import os
import tempfile
from pathlib import Path

from servers.settings import Settings
from servers.store.engine import database_url, open_engine


def put_database(data_dir: Path) -> None:
    """For a coordinator with this data directory and the default `DATABASE_URL`."""
    path = Path(str(database_url(Settings().database_url, data_dir).database))
    path.touch(mode=0o600)
    path.write_bytes(_content())


@functools.cache
def _content() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        url = database_url(Settings().database_url, Path(place))
        open_engine(url).dispose()
        (name,) = os.listdir(place)  # the last to close it has put away what lay beside it
        return Path(place, name).read_bytes()
