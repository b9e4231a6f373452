"""`python -m agent.simulated`: one simulated Ollama, until it is stopped. Prints one line with its URL."""

import signal

import click
import trio

from agent.simulated.models import NodeSpec, demo_nodes, guessed_model, recorded_models
from agent.simulated.reading import Refusal
from agent.simulated.server import SimulatedOllama


def chosen_models(names: tuple[str, ...], group: str | None) -> tuple[object, ...]:
    """The models that the command line asks for. Raises `click.UsageError`."""
    try:
        own = tuple(guessed_model(name) for name in names)
    except Refusal as refusal:
        raise click.UsageError(f"--model: {refusal.text}; give a name such as llama3.2:3b") from None
    return (*(recorded_models() if group == "recorded" else ()), *own)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=0, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@click.option("--name", default="simulated", show_default=True, help="Name in the header X-Simulated-Ollama.")
@click.option("--demo", type=click.Choice([spec.name for spec in demo_nodes()]), help="Be this node of the demo set.")
@click.option("--model", "names", multiple=True, help="A model to have, such as llama3.2:3b; may be repeated.")
@click.option("--models", "group", type=click.Choice(["recorded"]), help="The models of the recorded conversations.")
@click.option("--speed", default=1.0, show_default=True, type=click.FloatRange(0.001, 10_000), help="How many times as fast as usual.")
@click.option("--slots", default=1, show_default=True, type=click.IntRange(1, 64), help="Requests that one model serves at once.")
@click.option("--load-seconds", "load_s", type=click.FloatRange(0, 3600), help="Time to load a model; by its size if not given.")
@click.option("--version", default="0.33.0", show_default=True, help="What /api/version says.")
@click.option("--seed", default=0, show_default=True, help="Nodes with one seed say the same.")
def main(
    host: str,
    port: int,
    name: str,
    demo: str | None,
    names: tuple[str, ...],
    group: str | None,
    speed: float,
    slots: int,
    load_s: float | None,
    version: str,
    seed: int,
) -> None:
    """A simulated Ollama: it speaks Ollama's protocol and answers with made-up words."""
    if demo is not None:
        spec: NodeSpec = next(spec for spec in demo_nodes() if spec.name == demo)
        sim = SimulatedOllama.from_spec(spec)
    else:
        models = chosen_models(names, group) or (guessed_model("llama3.2:3b"),)
        sim = SimulatedOllama(name=name, models=models, speed=speed, slots=slots, load_s=load_s, version=version, seed=seed)  # type: ignore[arg-type]
    try:
        sim.bind(host, port)
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}:{port} ({error.strerror}); give another --host or --port") from None
    trio.run(_serve, sim)


async def _serve(sim: SimulatedOllama) -> None:
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            await nursery.start(sim.run)
            print(f"simulated Ollama '{sim.name}' (no real model behind it), {sim.knobs.slots} slot(s), on {sim.url}", flush=True)
            async for _ in signals:
                break
        await sim.stop()


if __name__ == "__main__":
    main()
