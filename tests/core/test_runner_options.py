"""Runner options: what makes no difference, who can share a runner, and what raising a context would do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.runner_options import canonical, context_of, fits, raised_to

OPTIONS = st.lists(
    st.sampled_from(
        ["main_gpu=0", "num_batch=64", "num_ctx=-1", "num_ctx=2048", "num_ctx=8192", "num_gpu=-1", "num_gpu=9", "use_mmap=true"]
    ),
    unique_by=lambda part: part.split("=")[0],
).map(lambda parts: ",".join(sorted(parts)))


@pytest.mark.parametrize(
    ("given_as", "trained", "means"),
    [
        ("", 4096, ""),
        ("num_ctx=8192", 0, "num_ctx=8192"),
        ("num_ctx=8192", 4096, "num_ctx=4096"),
        ("num_ctx=2048", 4096, "num_ctx=2048"),
        ("num_gpu=-1", 4096, ""),
        ("num_gpu=10", 4096, "num_gpu=10"),
        ("num_ctx=9000,num_thread=4,use_mmap=false,shift=true", 8192, "num_ctx=8192,num_thread=4,use_mmap=false"),
        ("shift=false", 4096, "shift=false"),
    ],
)
def test_what_makes_no_difference_is_left_out(given_as: str, trained: int, means: str) -> None:
    assert canonical(given_as, trained) == means


@given(OPTIONS, st.sampled_from([0, 1024, 4096]))
def test_the_canonical_form_is_its_own(options: str, trained: int) -> None:
    once = canonical(options, trained)
    assert canonical(once, trained) == once


def test_the_context_is_one_of_them() -> None:
    assert context_of("num_ctx=5,num_gpu=1") == 5
    assert context_of("num_gpu=1") is None
    assert context_of("") is None


@pytest.mark.parametrize(
    ("wanted", "runner", "loaded", "fit"),
    [
        ("", "", None, True),
        ("num_ctx=8", "num_ctx=8", None, True),
        ("num_ctx=8", "num_ctx=9", None, False),
        ("num_ctx=8", "", 8, True),  # the node's own choice is what is asked for
        ("num_ctx=8", "", 9, False),
        ("num_ctx=8", "", None, False),
        ("", "num_ctx=8", 8, False),  # what the node would choose is not known
        ("num_ctx=8,num_gpu=1", "num_ctx=8", 8, False),
        ("num_gpu=1", "", None, False),
        ("num_ctx=8,num_gpu=1", "num_gpu=1", 8, True),
    ],
)
def test_who_can_share_a_runner(wanted: str, runner: str, loaded: int | None, fit: bool) -> None:
    assert fits(wanted, runner, loaded) is fit


@pytest.mark.parametrize(
    ("wanted", "runner", "loaded", "raised"),
    [
        ("num_ctx=4", "num_ctx=8", None, 8),
        ("num_ctx=4", "", 8, 8),
        ("num_ctx=8", "num_ctx=8", None, None),  # it fits as it is
        ("num_ctx=9", "num_ctx=8", None, None),  # never lowered
        ("num_ctx=4", "", None, None),
        ("", "num_ctx=8", 8, None),  # there is no value in the request that could be raised
        ("num_ctx=4,num_gpu=1", "num_ctx=8", None, None),
    ],
)
def test_only_a_smaller_context_is_raised(wanted: str, runner: str, loaded: int | None, raised: int | None) -> None:
    assert raised_to(wanted, runner, loaded) == raised
    assert fits(wanted, runner, loaded, raises=True) is (raised is not None or fits(wanted, runner, loaded))


@given(OPTIONS, st.none() | st.integers(1, 10_000))
def test_everything_fits_itself(options: str, loaded: int | None) -> None:
    assert fits(options, options, loaded)
    assert raised_to(options, options, loaded) is None
