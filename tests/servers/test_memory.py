"""What outlives a restart: keys with what they used, and history's place in time."""

from pathlib import Path

from core.keys import Use, make_key
from core.units import UnixMs
from servers import clock
from servers.access import Access
from servers.memory import KEY, Memory
from servers.settings import Settings
from servers.tokens import Tokens


class Life:
    """One run of a coordinator, as far as memory goes."""

    def __init__(self, data: Path) -> None:
        settings = Settings()
        self.memory = Memory(settings, data)
        self.tokens = Tokens(admin_token="admin", join_token=None, fleet_secret="fleet")
        self.access = Access(settings, self.tokens, our_ports={1})
        self.memory.restore(self.access, self.tokens)
        self.memory.start()


def test_keys_and_what_they_used_survive(tmp_path: Path) -> None:
    first = Life(tmp_path)
    now = clock.unix_ms()
    for name in ("kept", "removed"):
        key = make_key(key_id=name, name=name, now=now, models=("m",), tokens_per_day=10)
        first.access.keys.add(key)
        secret = first.tokens.mint_key(name)
        first.memory.save_key(key, Use())
        if name == "kept":
            kept = secret
    first.access.keys.remove("removed")
    first.tokens.forget_key("removed")
    first.memory.forget_key("removed")
    first.access.keys.spend("kept", prompt_tokens=4, output_tokens=6, now=now)
    first.memory.close()

    second = Life(tmp_path)
    assert second.tokens.key_of(kept) == "kept"
    ((key, use),) = second.access.keys.listed()
    assert (key.name, key.models, use.tokens_today) == ("kept", ("registry.ollama.ai/library/m:latest",), 10)
    assert second.access.keys.admit("kept", now=UnixMs(now + 1)) is not None
    second.memory.close()


def test_a_key_that_cannot_be_read_opens_nothing_and_the_others_do(tmp_path: Path) -> None:
    first = Life(tmp_path)
    first.memory.store.put_thing(KEY, "broken", b"{}")
    first.memory.close()
    second = Life(tmp_path)
    assert second.access.keys.listed() == []
    second.memory.close()
