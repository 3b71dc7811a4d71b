"""The order in which requests go: earliest deadline first, of equal ones the shortest; late ones behind all others.

By deadline, not by slack: of requests that came at once with one target, by slack the longest would go first, and if
not all can be in time, that is the wrong way round.
"""

import math

from nitsum_jax.control.job import Job

Urgency = tuple[float, float, str]
ANY: Urgency = (math.inf, math.inf, "")
"""More than any request's urgency: none has come at the end of time."""


def urgency(job: Job) -> Urgency:
    """Sorts requests: less goes first."""
    if job.late:
        return math.inf, job.arrival_s, job.id
    return job.due_s, -job.latest_start_s, job.id
