"""The tree of exceptions is what its page says."""

import pytest

from core import errors


def test_the_tree() -> None:
    assert issubclass(errors.IllegalTransition, errors.LocalError)
    for kind in (errors.LocalError, errors.RemoteError, errors.ConfigError):
        assert issubclass(kind, errors.RouterError)
    assert not issubclass(errors.RemoteError, errors.LocalError)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_remote_error_carries_the_status_to_answer_with(status: int) -> None:
    error = errors.RemoteError("say what to do", status=status)
    assert (str(error), error.status) == ("say what to do", status)


def test_without_a_status_it_is_a_bad_request() -> None:
    assert errors.RemoteError("x").status == 400
