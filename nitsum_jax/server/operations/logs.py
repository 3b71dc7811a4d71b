"""The log: text for people or JSON for machines, and one line per request that ended. No prompt, no output, no key."""

import datetime
import json
import logging
from typing import Any, Final

from nitsum_jax.runtime.records import ServedRequest

REQUESTS: Final = logging.getLogger("nitsum_jax.requests")
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (RFC 3339, UTC), level, logger, message, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure(level: str, form: str) -> None:
    """Sets the root logger up to write to stderr.

    Args:
      level: "debug", "info", "warning" or "error"; requests are logged at info.
      form: "text" or "json".
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def log_request(record: ServedRequest) -> None:
    """Logs a request that ended."""
    if not REQUESTS.isEnabledFor(logging.INFO):
        return
    fields = {
        "request": record.id,
        "x_request_id": record.call_id or None,
        "client": record.client or None,
        "fairness_id": record.fairness_id or None,
        "tier": record.tier,
        "ttft_target_ms": record.ttft_target_ms,
        "tpot_target_ms": record.tpot_target_ms,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.tokens,
        "queue_ms": _ms(record.queue_s),
        "ttft_ms": _ms(record.ttft_s),
        "tpot_ms": _ms(record.tpot_s),
        "finish": None if record.finish is None else str(record.finish),
        "error": record.error,
    }
    present = {name: value for name, value in fields.items() if value is not None}
    words = " ".join(f"{name}={value}" for name, value in present.items() if name != "error")
    REQUESTS.info("%s", words if record.error is None else f"{words} error={record.error!r}", extra={"fields": present})


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
