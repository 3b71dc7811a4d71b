"""What an inference gateway says of a request in its headers: targets, objective, and whom it is for.

The names are those of llm-d's router and of the Gateway API inference extension; gRPC carries them as metadata.

| header | meaning |
|---|---|
| `x-slo-ttft-ms`, `x-slo-tpot-ms` | targets of the request, instead of those of its tier |
| `x-gateway-inference-objective` | if a tier has this name, it is the tier of a request that names none |
| `x-gateway-inference-fairness-id` | whom the request is for: logged, and a client of its own with --behind_gateway |

Newer routers write `x-llm-d-inference-` instead of `x-gateway-inference-`.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from nitsum_jax.control.tiers import LEAST_TARGET_MS, MOST_TARGET_MS
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.runtime.callers import sane_id
from nitsum_jax.runtime.calls import Call, check_target

TTFT, TPOT = "x-slo-ttft-ms", "x-slo-tpot-ms"
OBJECTIVE = ("x-gateway-inference-objective", "x-llm-d-inference-objective")
FAIRNESS = ("x-gateway-inference-fairness-id", "x-llm-d-inference-fairness-id")
_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,20})?")

HeaderPairs = Iterable[tuple[bytes, bytes]]
"""Names in lower case, as ASGI has them."""


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayHeaders:
    """What the headers of a request say.

    Attributes:
      ttft_ms, tpot_ms: targets; None: not given.
      objective: name; empty: none.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    objective: str = ""

    def tier(self, tiers: Sequence[str]) -> str | None:
        """The tier that the objective names, if one does."""
        return self.objective if self.objective in tiers else None

    def applied(self, call: Call, tier: str | None) -> Call:
        """A call with these targets, where it has none of its own, and in this tier if one is given."""
        request = call.request
        ttft_ms = self.ttft_ms if request.ttft_ms is None else request.ttft_ms
        tpot_ms = self.tpot_ms if request.tpot_ms is None else request.tpot_ms
        if tier is None and (ttft_ms, tpot_ms) == (request.ttft_ms, request.tpot_ms):
            return call
        changed = dataclasses.replace(request, tier=tier or request.tier, ttft_ms=ttft_ms, tpot_ms=tpot_ms)
        return dataclasses.replace(call, request=changed)


def gateway_headers(headers: HeaderPairs) -> GatewayHeaders:
    """Reads them; others are skipped.

    Raises:
      InvalidInputError: a target is malformed or out of range; the text names the header.
    """
    found = dict(headers)
    objective = next((value for name in OBJECTIVE if (value := _text(found, name))), "")
    return GatewayHeaders(_target(found, TTFT), _target(found, TPOT), objective)


def fairness_id(headers: HeaderPairs) -> str:
    """Whom the request is for; empty where nothing sane says it."""
    found = dict(headers)
    return next((value for name in FAIRNESS if (value := sane_id(_text(found, name)))), "")


def header_pairs(metadata: Iterable[tuple[str, str | bytes]] | None) -> list[tuple[bytes, bytes]]:
    """gRPC's metadata as headers."""
    return [
        (str(name).lower().encode("latin-1", "replace"), value if isinstance(value, bytes) else value.encode())
        for name, value in metadata or ()
    ]


def _text(headers: dict[bytes, bytes], name: str) -> str:
    return headers.get(name.encode(), b"").decode("latin-1").strip()


def _target(headers: dict[bytes, bytes], name: str) -> float | None:
    if name.encode() not in headers:
        return None
    text = _text(headers, name)
    if not _NUMBER.fullmatch(text):
        raise InvalidInputError(f"{name}: {text[:40]!r} must be milliseconds, such as 500")
    value = float(text)
    check_target(name, value)
    return value


def _parameter(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


_MS: Final = {"type": "number", "minimum": LEAST_TARGET_MS, "maximum": MOST_TARGET_MS}
HEADER_PARAMETERS: Final = (
    _parameter(TTFT, "Target for the time to the first token, milliseconds; else that of the tier.", _MS),
    _parameter(TPOT, "Target for the time per output token, milliseconds; else that of the tier.", _MS),
    _parameter(OBJECTIVE[0], "If a tier has this name: the tier of a request that names none.", {}),
    _parameter(FAIRNESS[0], "Whom the request is for; logged.", {}),
)
"""For the OpenAPI document."""
