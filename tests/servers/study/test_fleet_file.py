"""Fleet files: what may be said of machines and models, and what is said of mistakes."""

import re
from pathlib import Path

import pytest

from servers.study import fleet_file
from servers.study.fleet_file import FleetError, homogeneous, mixed, read, usable_mixes
from servers.study.traces import Trace, mixes_of
from tests.house.tree import ROOT


def fleet(tmp_path: Path, text: str) -> fleet_file.Fleet:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    return read(path)


def test_the_example_in_the_docs_works_also_with_its_other_machine(tmp_path: Path) -> None:
    example = (ROOT / "docs" / "fleet.example.toml").read_text()
    three = fleet(tmp_path, example)
    four = fleet(tmp_path, re.sub(r"^# (\[\[node\]\]|gpu|slots)", r"\1", example, flags=re.MULTILINE))
    assert [node.name for node in three.nodes] == ["rtx-3090-0", "rtx-3090-1", "office"]
    assert [node.name for node in four.nodes][3:] == ["rtx-4090-3"]
    assert "my-own:22b" in four.nodes[3].models
    assert usable_mixes(three, Trace(), mixes_of(Trace())).keys() == {"code", "conversation"}


def test_named_gpus_hold_what_fits(tmp_path: Path) -> None:
    small, large = fleet(tmp_path, '[[node]]\ngpu = "rtx-3060"\n[[node]]\ngpu = "a100-80"\nmemory_gb = 40\n').nodes
    assert "llama3.1:70b" not in large.models
    assert "qwen2.5:32b" in large.models
    assert "qwen2.5:32b" not in small.models
    assert (small.timing.slots, small.timing.max_loaded) == (4, 3)


def test_a_machine_by_its_speeds_and_a_model_by_its_size(tmp_path: Path) -> None:
    text = """
        [[node]]
        name = "odd"
        memory_gb = 30
        decode_tok_s = 100
        prefill_tok_s = 1000
        models = ["big"]
        [[model]]
        name = "big"
        size_gb = 9.8
        prefill = 0.25
    """
    (node,) = fleet(tmp_path, text).nodes
    assert node.name == "odd"
    assert node.models["big"].decode_tokens_s == pytest.approx(50.0)
    assert node.models["big"].prefill_tokens_s == 250.0


@pytest.mark.parametrize(("text", "says"), [
    ("", "is not a fleet file"),
    ("node = [", "is not TOML"),
    ("node = []", "at least one"),
    ("[[node]]\ngpu = 'x'", "the gpu 'x' is not known: use one of rtx-3060"),
    ("[[node]]\ngpus = 'rtx-3060'", "unknown field `gpus`"),
    ("[[node]]\nmemory_gb = 3", "node-0 needs a gpu"),
    ("[[node]]\ngpu = 'rtx-3060'\nmemory_gb = 0", "must be above 0"),
    ("[[node]]\ngpu = 'rtx-3060'\ncount = 0", "count must be 1 to"),
    ("[[node]]\ngpu = 'rtx-3060'\nslots = 65", "slots and max_loaded 1 to 64"),
    ("[[node]]\ngpu = 'rtx-3060'\nmodels = ['y']", "the speed of the model y is not known"),
    ("[[node]]\ngpu = 'rtx-3060'\nmodels = ['llama3.1:70b']", "llama3.1:70b does not fit into 12 GB"),
    ("[[node]]\ngpu = 'rtx-3060'\n[[model]]\nname = 'm'\nsize_gb = 0", "the model m: sizes"),
    ("[[node]]\ngpu = 'rtx-3060'\n[mix]\ncode = {}", "the mix of code needs weights"),
    ("[[node]]\ngpu = 'rtx-3060'\ncount = 200\n[[node]]\ngpu = 'rtx-3060'\ncount = 100", "256 machines at most"),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(FleetError, match=re.escape(says)) as told:
        fleet(tmp_path, text)
    assert "\n" not in str(told.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="cannot be read"):
        read(tmp_path / "gone.toml")


def test_models_that_no_machine_holds_are_left_out_of_the_mix(tmp_path: Path) -> None:
    one = fleet(tmp_path, '[[node]]\ngpu = "rtx-3060"\nmodels = ["llama3.1:8b", "qwen2.5:14b"]\nslots = 1')
    assert usable_mixes(one, Trace(), mixes_of(Trace())) == {
        "code": {"qwen2.5:14b": 15},
        "conversation": {"llama3.1:8b": 38, "qwen2.5:14b": 9},
    }
    with pytest.raises(FleetError, match="no machine holds what 'code' requests"):
        usable_mixes(fleet(tmp_path, '[[node]]\ngpu = "rtx-3060"\nmodels = ["llama3.1:8b"]'), Trace(), mixes_of(Trace()))


def test_the_fleets_of_the_tables() -> None:
    assert len(mixed().nodes) == len(homogeneous().nodes) == 8
    assert {node.timing.slots for node in mixed(slots=1).nodes} == {1}
    assert all(len(node.models) == 3 for node in homogeneous().nodes)
