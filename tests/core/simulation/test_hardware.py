"""Machines and models have the speeds their source gives."""

from core.simulation.hardware import GPUS, MIXED, MODELS, fits, model_timing, node_timing


def test_an_8b_model_has_the_measured_speed() -> None:
    timing = model_timing("llama3.1:8b", MODELS["llama3.1:8b"], GPUS["rtx-4090"])
    assert (timing.decode_tokens_s, timing.prefill_tokens_s) == (127.7, 6899.0)


def test_bigger_models_are_slower_and_load_longer() -> None:
    gpu = GPUS["a100-80"]
    by_size = sorted(MODELS.values(), key=lambda model: model.size_gb)
    assert [model.decode for model in by_size] == sorted((model.decode for model in by_size), reverse=True)
    loads = [node_timing(gpu).load_s(model_timing("m", model, gpu)) for model in by_size]
    assert loads == sorted(loads)
    assert abs(loads[0] - 2.0) < 0.01  # 1 s + 2 GB at 2 GB/s


def test_load_speed_and_slope_can_be_varied() -> None:
    gpu = GPUS["rtx-3060"]
    assert node_timing(gpu, load_speed=3.0).load_bytes_s == 3 * node_timing(gpu).load_bytes_s
    assert node_timing(gpu, batch_slope=0.6).batch_slope == 0.6


def test_what_fits_where() -> None:
    assert [name for name in MIXED if fits(MODELS["llama3.1:70b"], GPUS[name])] == ["m2-ultra", "a100-80"]
    assert all(fits(MODELS["llama3.2:3b"], GPUS[name]) for name in MIXED)
    assert not fits(MODELS["qwen2.5:32b"], GPUS["rtx-3060"])
