"""How an output ends other than by its own end: what front ends translate into their protocol's words."""


class DeadlineError(Exception):
    """The engine gave a request up because its deadline had passed (DEADLINE_EXCEEDED)."""


class GenerationError(Exception):
    """The engine failed on one request; the message is the engine's line (INTERNAL)."""
