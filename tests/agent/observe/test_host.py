"""This machine's load, name and address."""

import psutil
import pytest

from agent.observe import host


def test_percentages_are_percentages(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, memory = host.cpu_and_memory()
    assert 0 <= cpu <= 100
    assert 0 < memory <= 100
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 104.2)
    assert host.cpu_and_memory()[0] == 100.0
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: -0.3)
    assert host.cpu_and_memory()[0] == 0.0


def test_a_machine_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.machine_name()
    monkeypatch.setattr("socket.gethostname", lambda: "")
    assert host.machine_name() == "unnamed"


def test_the_address_towards_loopback_is_loopback() -> None:
    assert host.source_address("127.0.0.1", 8080) == "127.0.0.1"
    assert host.source_address("no such host.invalid", 8080) is None
