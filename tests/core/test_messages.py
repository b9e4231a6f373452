"""What coordinator and agent say: any bytes are a message or a `RemoteError`."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import messages
from core.errors import RemoteError
from core.messages import (
    AgentSettings,
    EndingReport,
    EndingReports,
    EndingReportsAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Metrics,
    Registration,
    RegistrationAnswer,
)

REGISTRATION: dict[str, Any] = {
    "machine_name": "gpu-1", "ip_address": "192.168.1.5", "ollama_version": "0.33.0", "ollama_port": 11434, "gpu_available": True,
    "gpu_devices": [{"model": "RTX 4090", "count": 2}],
}  # fmt: skip
HEARTBEAT: dict[str, Any] = {"agent_id": "a", "cpu_usage": 12.5, "memory_usage": 50}
METRICS: dict[str, Any] = {"cpu_usage": 1, "memory_usage": 2}
ENDING: dict[str, Any] = {"request_id": "r", "ending": "success"}
KINDS: list[type[Any]] = [
    Registration,
    RegistrationAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Metrics,
    AgentSettings,
    EndingReports,
    EndingReportsAnswer,
]


def refused(data: bytes, kind: type[Any]) -> tuple[int, str]:
    with pytest.raises(RemoteError) as error:
        messages.decode(data, kind)
    assert "\n" not in str(error.value)
    return error.value.status, str(error.value)


def body(known: dict[str, Any], **changed: Any) -> bytes:
    return json.dumps(known | changed).encode()


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (Registration, REGISTRATION),
        (Heartbeat, HEARTBEAT),
        (Metrics, METRICS),
        (AgentSettings, {}),
        (HeartbeatAnswer, {}),
        (EndingReports, {"reports": [ENDING]}),
        (EndingReportsAnswer, {}),
    ],
)
def test_a_message_comes_back_as_it_was(kind: type[msgspec.Struct], known: dict[str, Any]) -> None:
    message = messages.decode(json.dumps(known).encode(), kind)
    assert messages.decode(messages.encode(message), kind) == message


def test_the_seeds_registration_is_understood() -> None:
    message = messages.decode(body(REGISTRATION, unknown_field=[1, 2]), Registration)
    assert message.gpu_devices == [messages.GpuDevice(model="RTX 4090", count=2)]
    assert (message.boot, message.instance_id, message.agent_api_port) == (0, None, None)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["cpu_usage", "memory_usage", "gpu_temperature"])
def test_a_number_that_is_none_is_impossible_and_names_its_field(field: str, number: str) -> None:
    data = json.dumps(HEARTBEAT | {field: 77.25}).replace("77.25", number).encode()
    status, text = refused(data, Heartbeat)
    assert status == 422
    assert field in text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b'{"agent_id": NaN',
        b"NaNa",
        b"{'a': NaN}",
        b'{"agent_id": "NaN" NaN}',
        b'{"loaded_models": ' + b"[" * 100_000,
        b'{"agent_id": "\xff\xfe"}',
        b'{"x": nan}',
    ],
)
def test_what_is_not_json_is_400(data: bytes) -> None:
    status, text = refused(data, Heartbeat)
    assert (status, text) == (400, "the request body is not valid JSON")


def test_words_in_strings_are_not_taken_for_numbers() -> None:
    data = body(HEARTBEAT, agent_id='NaN "Infinity": \\')
    assert messages.decode(data, Heartbeat).agent_id == 'NaN "Infinity": \\'
    assert refused(b"NaN", Heartbeat) == (422, "a number must be a finite number, not NaN")
    assert refused(b'{"say \\"NaN\\"": "x", "loaded_models": [1, -Infinity]}', Heartbeat)[1].startswith("loaded_models ")


@pytest.mark.parametrize(
    ("field", "value"),
    [("agent_id", 5), ("cpu_usage", "high"), ("active_requests", 1.5), ("loaded_models", {}), ("in_flight", [1]), ("draining", "yes")],
)
def test_a_value_of_the_wrong_type_names_its_field(field: str, value: Any) -> None:
    status, text = refused(body(HEARTBEAT, **{field: value}), Heartbeat)
    assert status == 400
    assert field in text


def test_a_missing_field_is_named() -> None:
    assert "cpu_usage" in refused(b'{"agent_id": "a", "memory_usage": 1}', Heartbeat)[1]


@pytest.mark.parametrize(
    ("kind", "known", "field", "value"),
    [
        (Heartbeat, HEARTBEAT, "cpu_usage", 100.1),
        (Heartbeat, HEARTBEAT, "memory_usage", -0.1),
        (Heartbeat, HEARTBEAT, "gpu_usage", 101),
        (Heartbeat, HEARTBEAT, "gpu_memory_usage", -1),
        (Heartbeat, HEARTBEAT, "active_requests", -1),
        (Heartbeat, HEARTBEAT, "gpu_memory_total_mb", -1),
        (Heartbeat, HEARTBEAT, "average_response_time_ms", -1),
        (Heartbeat, HEARTBEAT, "boot", 1 << 54),
        (Heartbeat, HEARTBEAT, "sequence", 10**400),
        (Metrics, METRICS, "avg_response_time_ms", -5),
        (Metrics, METRICS, "cpu_usage", 250),
        (Registration, REGISTRATION, "ollama_port", 0),
        (Registration, REGISTRATION, "ollama_port", 65536),
        (Registration, REGISTRATION, "agent_api_port", 0),
        (Registration, REGISTRATION, "slots", 0),
        (Registration, REGISTRATION, "boot", -1),
    ],
)
def test_impossible_values_are_422_and_named(kind: type[Any], known: dict[str, Any], field: str, value: Any) -> None:
    status, text = refused(body(known, **{field: value}), kind)
    assert status == 422
    assert field in text


def test_an_ending_says_only_what_there_is_to_say() -> None:
    assert json.loads(messages.encode(EndingReports(reports=[EndingReport(**ENDING)]))) == {"reports": [ENDING], "dropped": 0}
    told = {
        **ENDING, "ending": "error", "status": 502, "message": "it died", "node_fault": "died", "prompt_tokens": 1, "output_tokens": 2,
        "total_ns": 3, "load_ns": 4, "prompt_ns": 5, "eval_ns": 6, "body_bytes": 7, "chunks": 8, "ttft_ms": 9.5, "duration_ms": 10.5,
    }  # fmt: skip
    (report,) = messages.decode(json.dumps({"reports": [told]}).encode(), EndingReports).reports
    assert msgspec.structs.asdict(report) == told


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", ""), ("request_id", "x" * 201), ("ending", "unknown"), ("status", 1000), ("status", -1), ("message", "x" * 4097),
        ("node_fault", "x" * 41), ("prompt_tokens", -1), ("output_tokens", (1 << 53) + 1), ("total_ns", 1.5), ("load_ns", -1),
        ("prompt_ns", -1), ("eval_ns", 1 << 60), ("body_bytes", -1), ("chunks", -1), ("ttft_ms", -0.5), ("duration_ms", -1),
        ("duration_ms", 1e300),
    ],
)  # fmt: skip
def test_endings_have_bounds(field: str, value: Any) -> None:
    status, text = refused(json.dumps({"reports": [ENDING, ENDING | {field: value}]}).encode(), EndingReports)
    assert status == 400
    assert text.endswith(f".{field}`")


def test_so_many_endings_are_one_message() -> None:
    reports = [ENDING] * messages.ENDINGS_MAX
    assert len(messages.decode(json.dumps({"reports": reports}).encode(), EndingReports).reports) == messages.ENDINGS_MAX
    assert refused(json.dumps({"reports": [*reports, ENDING]}).encode(), EndingReports)[0] == 400


@pytest.mark.parametrize("name", ["", "  ", "x" * 256])
def test_a_machine_has_a_name(name: str) -> None:
    assert refused(body(REGISTRATION, machine_name=name), Registration) == (400, "machine_name must have 1 to 255 characters")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("custom_name", "x" * 101), ("notes", "x" * 2001), ("tags", ["t"] * 21), ("tags", ["x" * 51]), ("tags", [" "]), ("weight", 0),
        ("weight", 101), ("max_concurrent", 0), ("max_concurrent", 10_001),
    ],
)  # fmt: skip
def test_settings_have_limits(field: str, value: Any) -> None:
    status, text = refused(json.dumps({field: value}).encode(), AgentSettings)
    assert status == 400
    assert field in text


def test_absent_settings_and_null_are_not_the_same() -> None:
    settings = messages.decode(b'{"custom_name": null, "tags": ["a"], "weight": 2}', AgentSettings)
    assert settings.custom_name is None
    assert settings.notes is msgspec.UNSET
    assert (settings.tags, settings.weight) == (["a"], 2)
    assert json.loads(messages.encode(settings)) == {"custom_name": None, "tags": ["a"], "weight": 2}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)


@given(
    st.one_of(
        st.binary(max_size=60),
        st.dictionaries(st.sampled_from([*HEARTBEAT, *REGISTRATION, "boot", "weight", "x"]), json_values).map(
            lambda d: json.dumps(d).encode()
        ),
    ),
    st.sampled_from(KINDS),
)
def test_any_bytes_are_a_message_or_a_remote_error(data: bytes, kind: type[Any]) -> None:
    refusal = None
    message = None
    try:
        message = messages.decode(data, kind)
    except RemoteError as error:
        refusal = error
    assert isinstance(message, kind) if refusal is None else refusal.status in (400, 422)
