"""The exceptions of the core. What the world did is never one of them: that is an event or an `Outcome`.

    RouterError
    ├── LocalError          a shell broke the core's rules: a bug of ours
    │   └── IllegalTransition   no such step in `core.lifecycle.TRANSITIONS`
    ├── RemoteError         bytes or values from outside make no sense; carries the HTTP status to answer with
    └── ConfigError         a setting that cannot be used; its text is one line that names the setting and what it takes

A broken invariant is an `AssertionError`.
"""


class RouterError(Exception):
    """Base of all of them; never raised itself."""


class LocalError(RouterError):
    """The caller did something that the core's contract forbids."""


class IllegalTransition(LocalError):
    """A state was given an input that the lifecycle table does not have."""


class RemoteError(RouterError):
    """What came from outside cannot be used.

    `status` is the HTTP status to answer with, the text one English sentence that says what to do about it.
    """

    def __init__(self, text: str, *, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class ConfigError(RouterError):
    """A setting that cannot be used."""
