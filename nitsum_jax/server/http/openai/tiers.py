"""OpenAI's `service_tier` and our latency tiers.

OpenAI's words mean: auto and default, the tier of requests that name none; flex, "batch"; priority, "interactive". A
tier of the server that has such a name itself goes before that.
"""

from collections.abc import Sequence

from nitsum_jax.runtime.calls import default_tier
from nitsum_jax.server.gateway import GatewayHeaders
from nitsum_jax.server.http.errors import ApiError

OPENAI_TIERS = ("auto", "default", "flex", "priority")
_OURS = {"flex": "batch", "priority": "interactive"}


def choose_tier(asked: str | None, tiers: Sequence[str], headers: GatewayHeaders) -> tuple[str, str]:
    """The tier that a request gets.

    Args:
      asked: `service_tier` of the request.
      tiers: names of the tiers that the server has.
      headers: of the request; a gateway may name a tier there for requests that name none.

    Returns:
      (name of the tier, what the response calls it: in the words of the request, "default" where that was auto).

    Raises:
      ApiError: there is no such tier.
    """
    if asked is not None and asked in tiers:
        return asked, asked
    if asked in (None, "auto", "default"):
        objective = headers.tier(tiers)
        return (default_tier(tiers), "default") if objective is None else (objective, objective)
    ours = _OURS.get(asked or "")
    if ours is not None and ours in tiers:
        return ours, str(asked)
    known = ", ".join(accepted(tiers))
    raise ApiError(400, f"service_tier {asked!r} is not known: give one of {known}", param="service_tier")


def accepted(tiers: Sequence[str]) -> list[str]:
    """What `service_tier` may be."""
    words = [word for word in OPENAI_TIERS if word not in _OURS or _OURS[word] in tiers]
    return list(dict.fromkeys((*words, *tiers)))
