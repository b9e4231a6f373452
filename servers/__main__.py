"""`python -m servers`: the coordinator, until it is told to stop; compiled where that was done."""

import native


def main() -> None:
    """The `ollama-router` command. What is compiled has to be known before any of it is imported."""
    native.use()
    from servers.cli import main as command

    command()


def serve() -> None:
    """Its `serve`."""
    native.use()
    from servers.cli import serve as command

    command(prog_name="python -m servers")


if __name__ == "__main__":
    serve()
