"""Readers of request traces: the public ones as they are published, and plain CSV and JSONL.

docs/simulator/workloads.md says what each format holds and where to get the traces.
"""

import csv
import dataclasses
import datetime
import io
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload

OWN_TIERS = "*"
"""In place of a tier's name: each request's tier stands in the trace itself."""

_Row = tuple[int, float, int, int, str | None]  # line, time in seconds on any clock, prompt, output, tier


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRead:
    """A trace that was read.

    Attributes:
      workload: its requests.
      skipped: rows left out because they generated nothing (failed or cancelled requests).
      raised: rows with an empty prompt, counted as a prompt of one token (the one a model starts from).
    """

    workload: Workload
    skipped: int
    raised: int


@dataclasses.dataclass(frozen=True, slots=True)
class TraceFlag:
    """A `--trace` flag taken apart.

    Attributes:
      tier: of all its requests; None if the trace names them itself (`*` in the flag).
      source: name of a file, or of a synthetic stand-in.
      format: name of the format; None to find it out from the first line.
    """

    tier: str | None
    source: str
    format: str | None


def parse_trace_flag(text: str) -> TraceFlag:
    """Takes `TIER:FILE[:FORMAT]` apart; TIER `*` leaves the tiers to the file.

    A last part with a dot or slash in it belongs to the name of the file.

    Raises:
      InvalidInputError: a part is missing, or the format is not known.
    """
    tier, colon, rest = text.partition(":")
    source, last, form = rest.rpartition(":")
    if not last or re.search(r"[./\\]", form):
        source, form = rest, ""
    if not (tier and colon and source) or (last and source != rest and not form):
        raise InvalidInputError(f"--trace={text}: write TIER:FILE or TIER:FILE:FORMAT, such as chat:azure.csv:azure")
    if form and form not in FORMATS:
        raise InvalidInputError(f"--trace={text}: unknown format {form!r}: use one of {', '.join(FORMATS)}")
    return TraceFlag(None if tier == OWN_TIERS else tier, source, form or None)


def read_trace(
    path: str | pathlib.Path, tier: str | None, format: str | None = None, *, until_s: float | None = None
) -> TraceRead:
    """Reads a trace file; see parse_trace.

    Raises:
      InvalidInputError: the file cannot be read, or parse_trace refuses it.
    """
    try:
        # newline="": the csv module wants to see line ends itself.
        with open(path, encoding="utf-8-sig", newline="") as file:
            return parse_trace(file, str(path), tier, format, until_s=until_s)
    except OSError as e:
        raise InvalidInputError(f"{path}: cannot read the trace: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InvalidInputError(f"{path}: the trace is not UTF-8 text") from e


def parse_trace(
    lines: Iterable[str], source: str, tier: str | None, format: str | None = None, *, until_s: float | None = None
) -> TraceRead:
    """Reads a trace from its lines.

    The public formats count time from their first request; in the plain ones `arrival_s` is taken as it stands.  Rows
    need not be in order.  The workload lasts until the last arrival and one mean gap more, so that its rate is that of
    the gaps.

    Args:
      lines: of the file, with line ends.
      source: what error messages call it; its stem becomes the name of the workload.
      tier: of all requests; None if the rows name theirs (plain formats only).
      format: one of FORMATS; recognised by the first line if None.
      until_s: reading ends at the first row that arrives later than this after the first row (for traces of a week of
        which an hour is wanted); everything is read if None.

    Raises:
      InvalidInputError: one line, `source:line: what is wrong`.
    """
    lines = iter(lines)
    first = next(lines, "")
    name = format or _detected(first, source)
    if name not in FORMATS:
        raise InvalidInputError(f"{source}: unknown trace format {name!r}: use one of {', '.join(FORMATS)}")
    form = FORMATS[name]
    rows = []
    skipped = raised = 0
    start: float | None = None
    for line, time, prompt, output, own in form.rows(_chain(first, lines), source):
        if start is None:
            start = time if form.rebased else 0.0
        if until_s is not None and time - start > until_s:
            break
        if output == 0:
            skipped += 1
            continue
        if prompt == 0:
            raised += 1
            prompt = 1
        row_tier = own if tier is None else tier
        if row_tier is None:
            raise InvalidInputError(f"{source}:{line}: the request names no tier: give one for the whole trace")
        rows.append((time, prompt, output, row_tier))
    if not rows:
        raise InvalidInputError(f"{source}: the trace has no requests")
    rows.sort(key=lambda row: row[0])
    start = rows[0][0] if form.rebased else 0.0
    requests = tuple(TraceRequest(time - start, prompt, output, t) for time, prompt, output, t in rows)
    span = requests[-1].arrival_s - requests[0].arrival_s
    gap = span / (len(requests) - 1) if span > 0 else 1.0
    workload = Workload(requests, pathlib.PurePath(source).stem, requests[-1].arrival_s + gap)
    return TraceRead(workload, skipped, raised)


def to_csv(workload: Workload) -> str:
    """The workload in the plain CSV format, with tiers; reading it back gives the same requests."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("arrival_s", "prompt_tokens", "output_tokens", "tier"))
    writer.writerows((repr(r.arrival_s), r.prompt_tokens, r.output_tokens, r.tier) for r in workload.requests)
    return out.getvalue()


@dataclasses.dataclass(frozen=True, slots=True)
class _Format:
    """How to read one format: names of its columns or keys, and what its times mean."""

    jsonl: bool
    time: str
    prompt: str
    output: str
    tier: str | None
    rebased: bool
    seconds: Callable[[str], float]

    def rows(self, lines: Iterable[str], source: str) -> Iterator[_Row]:
        return self._json_rows(lines, source) if self.jsonl else self._csv_rows(lines, source)

    def _csv_rows(self, lines: Iterable[str], source: str) -> Iterator[_Row]:
        reader = csv.reader(lines, strict=True)
        try:
            header = [column.strip().lower() for column in next(reader, [])]
            place = {}
            for column in (self.time, self.prompt, self.output):
                if column.lower() not in header:
                    raise InvalidInputError(f"{source}:1: column {column!r} is missing from the header")
                place[column] = header.index(column.lower())
            t, p, o = place.values()
            own = header.index(self.tier) if self.tier in header else None
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise _bad(source, reader.line_num, f"{len(row)} columns, but the header has {len(header)}")
                try:
                    time, prompt, output = self.seconds(row[t]), int(row[p]), int(row[o])
                except (ValueError, TypeError) as e:
                    raise _bad(source, reader.line_num, _which(self, row[t], row[p], row[o])) from e
                if not (prompt >= 0 <= output and math.isfinite(time) and (self.rebased or time >= 0)):
                    raise _bad(source, reader.line_num, _which(self, row[t], row[p], row[o]))
                yield reader.line_num, time, prompt, output, (row[own].strip() or None) if own is not None else None
        except csv.Error as e:
            raise _bad(source, reader.line_num, f"not valid CSV: {e}") from e

    def _json_rows(self, lines: Iterable[str], source: str) -> Iterator[_Row]:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise _bad(source, number, f"not valid JSON: {e}") from e
            if not isinstance(row, Mapping):
                raise _bad(source, number, "not a JSON object")
            for key in (self.time, self.prompt, self.output):
                if key not in row:
                    raise _bad(source, number, f"{key!r} is missing")
            time, prompt, output = row[self.time], row[self.prompt], row[self.output]
            own = None if self.tier is None else row.get(self.tier)
            sound = type(prompt) is int and type(output) is int and type(time) in (int, float)
            if not sound or not (prompt >= 0 <= output and math.isfinite(time) and (self.rebased or time >= 0)):
                raise _bad(source, number, _which(self, time, prompt, output))
            if own is not None and (not isinstance(own, str) or not own):
                raise _bad(source, number, f"tier {own!r} must be a name")
            yield number, time * self.seconds("1"), prompt, output, own


def _iso_seconds(text: str) -> float:
    """Seconds of an ISO date and time; without a zone it is taken as UTC, which keeps clock changes out."""
    stamp = datetime.datetime.fromisoformat(text.strip())
    if stamp.tzinfo is None:
        stamp = stamp.replace(tzinfo=datetime.UTC)
    return (stamp - _EPOCH) / _SECOND


_EPOCH = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)  # near the traces: more bits left for the fraction
_SECOND = datetime.timedelta(seconds=1)

FORMATS: Mapping[str, _Format] = {
    "azure": _Format(False, "TIMESTAMP", "ContextTokens", "GeneratedTokens", None, True, _iso_seconds),
    "mooncake": _Format(True, "timestamp", "input_length", "output_length", None, True, lambda text: float(text) / 1e3),
    "burstgpt": _Format(False, "Timestamp", "Request tokens", "Response tokens", None, True, float),
    "csv": _Format(False, "arrival_s", "prompt_tokens", "output_tokens", "tier", False, float),
    "jsonl": _Format(True, "arrival_s", "prompt_tokens", "output_tokens", "tier", False, float),
}
"""The formats by name; the first whose columns are all there is taken where none is named."""


def _detected(first: str, source: str) -> str:
    """The format, recognised by the first line."""
    jsonl = first.lstrip().startswith("{")
    fields: set[str]
    try:
        fields = {k.lower() for k in json.loads(first)} if jsonl else {c.strip().lower() for c in first.split(",")}
    except ValueError as e:
        raise _bad(source, 1, f"not valid JSON: {e}") from e
    for name, form in FORMATS.items():
        if form.jsonl == jsonl and {form.time.lower(), form.prompt.lower(), form.output.lower()} <= fields:
            return name
    raise InvalidInputError(
        f"{source}:1: this is the first line of no known trace format ({', '.join(FORMATS)}); the plain CSV form begins"
        " with arrival_s,prompt_tokens,output_tokens"
    )


def _which(form: _Format, time: object, prompt: object, output: object) -> str:
    """Which of the three values is wrong, in words."""
    for column, value in ((form.prompt, prompt), (form.output, output)):
        if not re.fullmatch(r"\s*\+?\d+\s*", str(value)) or isinstance(value, bool):
            return f"{column} {value!r} must be a whole number, 0 or more"
    return f"{form.time} {time!r} is not a valid time"


def _bad(source: str, line: int, what: str) -> InvalidInputError:
    return InvalidInputError(f"{source}:{line}: {' '.join(what.split())}")


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
