"""The order in which requests go: least slack first, late ones behind all others."""

import math

from nitsum_jax.control.job import Job

Urgency = tuple[float, float, str]
ANY: Urgency = (math.inf, math.inf, "")
"""More than any request's urgency: none has come at the end of time."""


def urgency(job: Job) -> Urgency:
    """Sorts requests: less goes first."""
    return (math.inf if job.late else job.latest_start_s), job.arrival_s, job.id
