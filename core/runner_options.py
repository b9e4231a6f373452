"""Runner options: which of a request's options make Ollama start another runner, and which requests can share one.

Decides by the words of options alone; knows no nodes, no time and no traffic. Options are canonical text, `name=value` with commas
between, sorted (`edge.body`); "" means that the request sets none, so that the node's own choice holds (it is *automatic*).

What Ollama compares (ollama-wire.md 2.4): all of them, the context clamped to what the model was trained with; a context that is
automatic on both sides is equal; a negative `num_gpu` matches anything; `shift` is true when it is not said.

Invariants: `canonical` of its own result changes nothing; whatever fits by its words fits itself.
"""


def canonical(options: str, trained_context: int) -> str:
    """`options` without what makes no difference. `trained_context` 0: not known."""
    if not options:
        return ""
    kept = []
    for part in options.split(","):
        name, _, value = part.partition("=")
        if (name == "num_gpu" and value.startswith("-")) or part == "shift=true":
            continue
        if name == "num_ctx" and trained_context and int(value) > trained_context:
            part = f"num_ctx={trained_context}"
        kept.append(part)
    return ",".join(kept)


def context_of(options: str) -> int | None:
    """The context length that they ask for; None when they leave it to the node."""
    return _split(options)[0]


def fits(wanted: str, runner: str, loaded_context: int | None, *, raises: bool = False) -> bool:
    """Whether a runner that was started with the options `runner` serves a request with the options `wanted` without a reload.

    `loaded_context`: what the node says the runner has, None when that is not known. `raises`: a smaller context may be raised.
    """
    if wanted == runner:
        return True
    context, rest = _split(wanted)
    runner_context, runner_rest = _split(runner)
    if rest != runner_rest or context is None:
        return False
    has = loaded_context if runner_context is None else runner_context
    return has is not None and (context == has or (raises and context < has))


def raised_to(wanted: str, runner: str, loaded_context: int | None) -> int | None:
    """To which context length the request must be raised to fit where only that makes it fit; None where nothing must be done."""
    if fits(wanted, runner, loaded_context) or not fits(wanted, runner, loaded_context, raises=True):
        return None
    return context_of(runner) or loaded_context


def _split(options: str) -> tuple[int | None, list[str]]:
    """The context length, and the other options."""
    context, rest = None, []
    for part in options.split(",") if options else ():
        if part.startswith("num_ctx="):
            context = int(part[8:])
        else:
            rest.append(part)
    return context, rest
