"""API keys: what each opens, how much it may use, and what it has used (contract 8).

Decides whether a request with a key may pass; must never know a secret (a shell finds the key that a secret belongs to), a header or a
clock. Names of models are judged as `core.names` reads them, and are what the node will see: an alias is resolved before it is asked
about.

Invariants: in any 60 s a key is admitted at most `requests_per_minute` times; a key that has used `tokens_per_day` since midnight UTC is
admitted no more that day (what was in flight by then is still counted, so the last requests may go beyond it); a refused request uses
nothing; a removed or expired key opens nothing.
"""

from collections import deque
from typing import Final

import msgspec

from core.errors import RemoteError
from core.names import display, key_or_none, normalise
from core.units import ModelKey, UnixMs

KEYS_MAX: Final = 10_000
NAME_MAX: Final = 100
"""Characters."""
MODELS_MAX: Final = 200
"""Models that one key names."""
REQUESTS_PER_MINUTE_MAX: Final = 60_000
"""The moments of a minute's requests are kept, eight bytes each."""

MINUTE_MS: Final = 60_000
DAY_MS: Final = 24 * 3600 * 1000

INFERENCE: Final = "inference"
MANAGEMENT: Final = "management"
SCOPES: Final = (INFERENCE, MANAGEMENT)
"""`inference`: asking models. `management`: everything that the admin token opens."""


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One key, as it was made. None means: no limit."""

    key_id: str
    name: str
    scopes: tuple[str, ...] = (INFERENCE,)
    models: tuple[ModelKey, ...] = ()
    """The only models it opens; empty: all."""
    created_at: UnixMs
    expires_at: UnixMs | None = None
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None


class Use(msgspec.Struct, kw_only=True):
    """What a key has used since it was made, and today."""

    requests: int = 0
    refused: int = 0
    """Requests over a limit, or for a model that the key does not open."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    last_used_at: UnixMs | None = None
    day: int = 0
    """Days since 1970 of `tokens_today`."""
    tokens_today: int = 0


class Refusal(msgspec.Struct, frozen=True):
    """Why a request with a key does not pass. `retry_after_s`: when it may be worth another try."""

    status: int
    text: str
    retry_after_s: int | None = None


def make_key(
    *,
    key_id: str,
    name: str,
    now: UnixMs,
    scopes: tuple[str, ...] = (INFERENCE,),
    models: tuple[str, ...] = (),
    expires_at: UnixMs | None = None,
    requests_per_minute: int | None = None,
    tokens_per_day: int | None = None,
) -> Key:
    """A key of what a caller asks for.

    Raises:
        RemoteError: 400, and which field cannot be used.
    """
    name = name.strip()
    if not name or len(name) > NAME_MAX or not name.isprintable():
        raise RemoteError(f"name must have 1 to {NAME_MAX} printable characters")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise RemoteError(f"scopes must be one or more of {', '.join(SCOPES)}")
    if len(models) > MODELS_MAX:
        raise RemoteError(f"models may name {MODELS_MAX} models at most")
    if expires_at is not None and expires_at <= now:
        raise RemoteError("expires_at lies in the past")
    if requests_per_minute is not None and not 1 <= requests_per_minute <= REQUESTS_PER_MINUTE_MAX:
        raise RemoteError(f"requests_per_minute must be from 1 to {REQUESTS_PER_MINUTE_MAX}")
    if tokens_per_day is not None and tokens_per_day < 1:
        raise RemoteError("tokens_per_day must be 1 or more")
    return Key(
        key_id=key_id,
        name=name,
        scopes=tuple(dict.fromkeys(scopes)),
        models=tuple(dict.fromkeys(map(_model, models))),
        created_at=now,
        expires_at=expires_at,
        requests_per_minute=requests_per_minute,
        tokens_per_day=tokens_per_day,
    )


def _model(spelling: str) -> ModelKey:
    try:
        return normalise(spelling)
    except RemoteError:
        raise RemoteError(f"models: {spelling[:NAME_MAX]!r} is no model's name") from None


def may_use(key: Key, model: str) -> bool:
    """Whether `key` opens the model that `model` names, in whatever spelling. What names no model is opened by no key with models."""
    return not key.models or key_or_none(model) in key.models


class Keys:
    """All keys of one router, by id."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}
        self._uses: dict[str, Use] = {}
        self._recent: dict[str, deque[UnixMs]] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: Key, use: Use | None = None) -> None:
        """Take `key` in; `use`: what it had used before a restart.

        Raises:
            RemoteError: 409 there are too many.
        """
        if len(self._keys) >= KEYS_MAX and key.key_id not in self._keys:
            raise RemoteError(f"there are {KEYS_MAX} keys already: remove some", status=409)
        self._keys[key.key_id] = key
        self._uses[key.key_id] = use or Use()
        self._recent[key.key_id] = deque()

    def remove(self, key_id: str) -> Key:
        """Forget a key.

        Raises:
            RemoteError: 404.
        """
        key = self._keys.pop(key_id, None)
        if key is None:
            raise RemoteError("no key has this id", status=404)
        del self._uses[key_id], self._recent[key_id]
        return key

    def get(self, key_id: str) -> Key | None:
        """The key, unless it was removed."""
        return self._keys.get(key_id)

    def listed(self) -> list[tuple[Key, Use]]:
        """All keys with what they used, oldest first."""
        return [(key, self._uses[key.key_id]) for key in self._keys.values()]

    def opens(self, key_id: str, scope: str, *, now: UnixMs) -> bool:
        """Whether the key is there, has not expired, and has `scope`."""
        key = self._keys.get(key_id)
        return key is not None and scope in key.scopes and (key.expires_at is None or now < key.expires_at)

    def admit(self, key_id: str, *, now: UnixMs) -> Refusal | None:
        """Count a request of a key that `opens` inference; None: it may pass."""
        key, use, recent = self._keys[key_id], self._uses[key_id], self._recent[key_id]
        if key.tokens_per_day is not None:
            if use.day != now // DAY_MS:
                use.day, use.tokens_today = now // DAY_MS, 0
            if use.tokens_today >= key.tokens_per_day:
                use.refused += 1
                text = f"the API key {key.name!r} has used its {key.tokens_per_day} tokens for today: try again after midnight UTC"
                return Refusal(429, text, (DAY_MS - now % DAY_MS + 999) // 1000)
        if key.requests_per_minute is not None:
            while recent and recent[0] <= now - MINUTE_MS:
                recent.popleft()
            if len(recent) >= key.requests_per_minute:
                use.refused += 1
                text = f"the API key {key.name!r} may make {key.requests_per_minute} requests per minute: slow down"
                return Refusal(429, text, max(1, (recent[0] + MINUTE_MS - now + 999) // 1000))
            recent.append(now)
        use.requests += 1
        use.last_used_at = now
        return None

    def judge_model(self, key_id: str, model: str | None, *, told_once: bool) -> Refusal | None:
        """Whether an admitted request may reach `model`: the name that the node will see, None when none can be read.

        `told_once`: the body names its model in one way only. Ollama folds the case of keys and takes the last duplicate; where a rule
        hangs on the name, only what everybody reads alike may pass (contract 8).
        """
        key = self._keys.get(key_id)
        if key is None:
            return Refusal(401, "the API key is not valid any more")
        if not key.models:
            return None
        refusal: Refusal | None = None
        if not told_once:
            text = f"the API key {key.name!r} is for certain models, and the request names its model more than once: name it once"
            refusal = Refusal(400, text)
        elif model is None:
            text = f"the API key {key.name!r} is for certain models, and the request's model cannot be read: send JSON with a model"
            refusal = Refusal(400, text)
        elif not may_use(key, model):
            allowed = ", ".join(map(display, key.models[:5])) + (", …" if len(key.models) > 5 else "")
            refusal = Refusal(403, f"the API key {key.name!r} is not for this model, only for {allowed}")
        if refusal is not None:
            self._uses[key_id].refused += 1
        return refusal

    def spend(self, key_id: str, *, prompt_tokens: int, output_tokens: int, now: UnixMs) -> None:
        """Count the tokens of a request that is over. A key removed meanwhile is not missed."""
        use = self._uses.get(key_id)
        if use is None:
            return
        if use.day != now // DAY_MS:
            use.day, use.tokens_today = now // DAY_MS, 0
        use.prompt_tokens += prompt_tokens
        use.output_tokens += output_tokens
        use.tokens_today += prompt_tokens + output_tokens
