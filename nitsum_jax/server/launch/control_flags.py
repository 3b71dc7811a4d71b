"""Flags of nitsum-serve about the controller, and what they come to."""

import dataclasses

from absl import flags

from nitsum_jax.control.planning.controller import ControllerConfig
from nitsum_jax.runtime.control.control_loop import Mode

_DEFAULTS = ControllerConfig()


@dataclasses.dataclass(frozen=True)
class ControlOptions:
    """The values of the flags.

    Attributes:
      mode: what the controller may do.
      interval_s: between its ticks.
      dwell_s: least time between two switches.
      timeout_s: longest wait for the planner.
      log: file that gets the decisions; None: none.
    """

    mode: Mode = Mode.OFF
    interval_s: float = _DEFAULTS.interval_s
    dwell_s: float = _DEFAULTS.dwell_s
    timeout_s: float = 5.0
    log: str | None = None

    def config(self) -> ControllerConfig:
        """For the controller."""
        return ControllerConfig(interval_s=self.interval_s, dwell_s=self.dwell_s)


def define(values: flags.FlagValues) -> None:
    """Adds the flags to those of a tool."""
    flags.DEFINE_enum(
        "planner",
        "off",
        list(Mode),
        "whether the planner changes the layout: off, only administrators do; advise, it only logs; on, it does",
        flag_values=values,
    )
    flags.DEFINE_float(
        "planner_interval", _DEFAULTS.interval_s, "seconds between decisions", lower_bound=0.1, flag_values=values
    )  # fmt: skip
    flags.DEFINE_float(
        "planner_dwell",
        _DEFAULTS.dwell_s,
        "least seconds between two switches",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "planner_timeout",
        5.0,
        "seconds after which a decision is given up and the layout stays",
        lower_bound=0.1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "decision_log",
        None,
        "file to which every decision is appended with its inputs, as a line of JSON, for nitsum-simulate --replay",
        flag_values=values,
    )


def read(values: flags.FlagValues) -> ControlOptions:
    """The options of parsed flags."""
    return ControlOptions(
        mode=Mode(values.planner),
        interval_s=values.planner_interval,
        dwell_s=values.planner_dwell,
        timeout_s=values.planner_timeout,
        log=values.decision_log,
    )
