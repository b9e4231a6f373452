"""The `ollama-router-agent` command: one agent beside one Ollama, until it is told to stop.

Decides only how the process starts and ends. Exit status: 0 after an orderly stop, 2 when a setting cannot be used.
"""

import os
import random
import signal
import sys
import time

import click
import trio

from agent import config as agent_config
from agent.daemon import AGENT_VERSION, Daemon
from agent.log import configure
from core.errors import ConfigError
from edge.steady import SteadyClock


@click.command(epilog="Settings come from the environment; the README lists them: ROUTER_URL, OLLAMA_API_BASE, AGENT_API_PORT and others.")
@click.version_option(AGENT_VERSION, prog_name="ollama-router-agent")
def main() -> None:
    """Register the Ollama of this machine with an Ollama Router, and pass requests on to it."""
    try:
        config = agent_config.load(os.environ)
        identity = agent_config.take_identity(config, unix_ms=time.time_ns() // 1_000_000)
        tail = configure(config.log_level, config.log_format)
        daemon = Daemon(config, identity, dice=random.Random().randrange, tail=tail)
        daemon.listen()
    except ConfigError as error:
        print(f"ollama-router-agent: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    trio.run(_run, daemon, clock=SteadyClock())


async def _run(daemon: Daemon) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_obey_signals, daemon)
        await daemon.run()
        nursery.cancel_scope.cancel()


async def _obey_signals(daemon: Daemon, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """The first signal asks for an orderly stop, the second stops at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            daemon.stop()
