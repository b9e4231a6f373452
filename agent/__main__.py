"""`python -m agent`: the agent, compiled where that was done."""

import native


def main() -> None:
    """The `ollama-router-agent` command. What is compiled has to be known before any of it is imported."""
    native.use()
    from agent.command import main as command

    command()


if __name__ == "__main__":
    main()
