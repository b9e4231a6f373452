"""Every case of every client, unmodified from its registry: through the router as at a node, and every broken stream noticed."""

import pytest

from tests.conformance.programs import CLIENTS, Case, Client
from tests.conformance.run import outcomes

EVERY = [pytest.param(client, case, id=str(case)) for client in CLIENTS for case in client.cases]


@pytest.mark.slow
@pytest.mark.parametrize(("client", "case"), EVERY)
def test_case(client: Client, case: Case) -> None:
    assert outcomes(client)[case].problem == ""
