"""`python -m servers`: the coordinator, until it is told to stop."""

from servers.cli import serve

if __name__ == "__main__":
    serve(prog_name="python -m servers")
