"""What nitsum-bench switch measures of one switch."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SwitchRow:
    """One switch, as it goes to the JSON file; milliseconds, bytes, GB/s.

    Attributes:
      stall_ms_p50: median over the streams of how long each stood still because of the switch.
      stall_ms_p99: the same, 99th percentile.
      decode_step_ms: mean gap between a stream's tokens in the new layout.
      transfer_gbps: the copies that the streams waited for.
      memcpy_gbps: a plain copy of as many bytes (of 1 MB at least).
      alternatives: milliseconds by name; `rebuild` leaves the draining out, and takes compiled steps from the cache if
        there is one.
    """

    from_layout: str
    to_layout: str
    live_sequences: int
    context_tokens: int
    weight_bytes_moved: int
    kv_bytes_moved: int
    kv_bytes_minimum: int
    stall_ms_p50: float
    stall_ms_p99: float
    decode_step_ms: float
    transfer_gbps: float
    memcpy_gbps: float
    alternatives: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A row and what the table says beyond it.

    Attributes:
      row: the JSON row.
      decode_step_before_ms: mean gap between a stream's tokens in the old layout.
      gap_ms_p99: longest time between two tokens of a stream around the switch, 99th percentile of the streams.
      kv_bytes_ahead: of the bytes moved, those that went ahead of the switch.
      host_ms: part of the engine's stall that plans, remaps, wraps and seats.
      transfer_ms: part of it that copies.
    """

    row: SwitchRow
    decode_step_before_ms: float
    gap_ms_p99: float
    kv_bytes_ahead: int
    host_ms: float
    transfer_ms: float

    def with_alternatives(self, **milliseconds: float) -> "Measured":
        """With these beside those that there are."""
        alternatives = self.row.alternatives | milliseconds
        return dataclasses.replace(self, row=dataclasses.replace(self.row, alternatives=alternatives))
