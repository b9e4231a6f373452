"""What callers prove themselves with: the admin token, join tokens, agents' tokens, and what the coordinator shows to gateways.

Decides whether a token is good, never what it opens. Invariants: the admin token and the fleet's secret lie in 0600 files and nowhere
else; every other token is kept as a hash only; comparisons take the same time whatever is wrong; no token is ever logged.
"""

import hashlib
import hmac
import os
from pathlib import Path
from typing import Final

from core.errors import ConfigError, RemoteError
from core.units import AgentId, UnixMs
from servers import clock

JOIN_TOKEN_LIFE_MS: Final = 24 * 3600 * 1000
JOIN_TOKENS_MAX: Final = 1000
"""Unexpired join tokens at once."""

AGENT_TOKENS_MAX: Final = 10_000
"""More agents than the router holds; beyond it the oldest token is void and its agent registers again."""

KEY_PREFIX: Final = "ork-"
"""Of an API key's secret, so that a person and a scanner of leaked secrets know what it is."""

ADMIN_TOKEN_FILE: Final = "admin-token"
FLEET_SECRET_FILE: Final = "fleet-secret"


def open_data_dir(path: Path) -> Path:
    """The data directory, created 0700 where it does not exist.

    Raises:
        ConfigError: it cannot be used.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"ROUTER_DATA_DIR: the directory {path} cannot be created: {error.strerror}") from None
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"ROUTER_DATA_DIR: the directory {path} cannot be written to")
    return path


def kept_secret(path: Path) -> str:
    """The secret in the 0600 file at `path`, made at the first call.

    Raises:
        ConfigError: the file cannot be used; it is never overwritten.
    """
    try:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            os.chmod(path, 0o600)
            text = path.read_text("ascii").strip()
        else:
            text = clock.new_secret()
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the secret in {path} cannot be read or made: {getattr(error, 'strerror', None) or 'not text'}") from None
    if len(text) < 8:
        raise ConfigError(f"the secret in {path} is too short: delete the file to have a new one made")
    return text


class Tokens:
    """All tokens of one coordinator."""

    def __init__(self, *, admin_token: str, join_token: str | None, fleet_secret: str) -> None:
        self._admin = _hashed(admin_token)
        self._fixed_join = _hashed(join_token) if join_token else None
        self._fleet_secret = fleet_secret.encode()
        self._own_agent: bytes | None = None
        self._join: dict[bytes, UnixMs] = {}
        self._agent_of: dict[bytes, AgentId] = {}
        self._token_of: dict[AgentId, bytes] = {}
        self._credentials: dict[AgentId, bytes] = {}
        self._key_of: dict[bytes, str] = {}

    @classmethod
    def from_files(cls, data_dir: Path, *, admin_token: str | None, join_token: str | None) -> "Tokens":
        """With the secrets of the data directory; what the environment gives wins over the file.

        Raises:
            ConfigError: a file cannot be used.
        """
        return cls(
            admin_token=admin_token or kept_secret(data_dir / ADMIN_TOKEN_FILE),
            join_token=join_token,
            fleet_secret=kept_secret(data_dir / FLEET_SECRET_FILE),
        )

    # ------------------------------------------------------------ admin and joining

    def is_admin(self, token: str) -> bool:
        """Whether `token` is the admin's."""
        return hmac.compare_digest(_hashed(token), self._admin)

    def mint_join_token(self, *, now: UnixMs) -> tuple[str, UnixMs]:
        """A new join token and when it expires.

        Raises:
            RemoteError: 429, there are too many that have not expired.
        """
        self._join = {digest: until for digest, until in self._join.items() if until > now}
        if len(self._join) >= JOIN_TOKENS_MAX:
            raise RemoteError(f"there are {JOIN_TOKENS_MAX} unexpired join tokens already: use one of them", status=429)
        token, until = clock.new_secret(), UnixMs(now + JOIN_TOKEN_LIFE_MS)
        self._join[_hashed(token)] = until
        return token, until

    def may_join(self, token: str, *, now: UnixMs) -> bool:
        """Whether `token` is a join token that has not expired."""
        digest = _hashed(token)
        if self._fixed_join is not None and hmac.compare_digest(digest, self._fixed_join):
            return True
        return self._join.get(digest, 0) > now

    def mint_own_agent_token(self) -> str:
        """A join token for the agent that `up` starts: it counts as this machine's, wherever it seems to call from."""
        token = clock.new_secret()
        self._own_agent = _hashed(token)
        return token

    def is_own_agent(self, token: str) -> bool:
        """Whether `token` was made by `mint_own_agent_token`."""
        return self._own_agent is not None and hmac.compare_digest(_hashed(token), self._own_agent)

    # ------------------------------------------------------------ API keys

    def mint_key(self, key_id: str) -> str:
        """The secret of a new API key."""
        secret = KEY_PREFIX + clock.new_secret()
        self._key_of[_hashed(secret)] = key_id
        return secret

    def key_of(self, token: str) -> str | None:
        """The id of the API key whose secret this is. Looked up by its hash, so that the time taken tells nothing of the secret."""
        return self._key_of.get(_hashed(token))

    def key_digest(self, key_id: str) -> bytes | None:
        """What is kept of a key's secret."""
        return next((digest for digest, known in self._key_of.items() if known == key_id), None)

    def restore_key(self, key_id: str, digest: bytes) -> None:
        """A key that was made before a restart."""
        self._key_of[digest] = key_id

    def forget_key(self, key_id: str) -> None:
        """The key was removed."""
        self._key_of = {digest: known for digest, known in self._key_of.items() if known != key_id}

    # ------------------------------------------------------------ agents

    def mint_agent_token(self, agent_id: AgentId) -> str:
        """A new token for an agent's own calls; its former one is void."""
        self.forget(agent_id)
        if len(self._token_of) >= AGENT_TOKENS_MAX:
            self.forget(next(iter(self._token_of)))
        token = clock.new_secret()
        digest = _hashed(token)
        self._agent_of[digest] = agent_id
        self._token_of[agent_id] = digest
        return token

    def agent_of(self, token: str) -> AgentId | None:
        """The agent whose token this is. Looked up by its hash, so that the time taken tells nothing of the token."""
        return self._agent_of.get(_hashed(token))

    def agent_digest(self, agent_id: AgentId) -> bytes | None:
        """What is kept of an agent's token."""
        return self._token_of.get(agent_id)

    def restore_agent(self, agent_id: AgentId, digest: bytes) -> None:
        """An agent's token from before a restart."""
        self.forget(agent_id)
        self._agent_of[digest] = agent_id
        self._token_of[agent_id] = digest

    def forget(self, agent_id: AgentId) -> None:
        """The agent was deleted, or has a new token."""
        if (digest := self._token_of.pop(agent_id, None)) is not None:
            del self._agent_of[digest]

    def gateway_credential(self, agent_id: AgentId) -> str:
        """What the coordinator shows to this agent's gateway."""
        return self.credential_of(agent_id).decode()

    def credential_of(self, agent_id: AgentId) -> bytes:
        """`gateway_credential` as header bytes; on the way of every request, hence kept."""
        credential = self._credentials.get(agent_id)
        if credential is None:
            if len(self._credentials) >= AGENT_TOKENS_MAX:
                self._credentials.clear()
            credential = hmac.new(self._fleet_secret, agent_id.encode(), hashlib.sha256).hexdigest().encode()
            self._credentials[agent_id] = credential
        return credential

    def derived(self, purpose: str) -> str:
        """A secret of this fleet for one purpose: the same after a restart, and nobody learns another from it."""
        return hmac.new(self._fleet_secret, purpose.encode(), hashlib.sha256).hexdigest()


def _hashed(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
