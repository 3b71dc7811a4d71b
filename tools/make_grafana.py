"""Writes docs/server/grafana/nitsum.json, the Grafana dashboard: `python tools/make_grafana.py`."""

import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATH = ROOT / "docs" / "server" / "grafana" / "nitsum.json"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_HERE = 'model_name=~"$model"'
_TIER = f'{_HERE},tier=~"$tier"'
_RATE = "$__rate_interval"
_SHARES = ((0.5, "p50"), (0.99, "p99"))


def _quantile(share: float, metric: str, labels: str = _TIER, by: str = "le,tier") -> str:
    return f"histogram_quantile({share}, sum by ({by}) (rate({metric}_bucket{{{labels}}}[{_RATE}])))"


def _rate(metric: str, labels: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{labels}}}[{_RATE}]))"


def _latency(title: str, metric: str, what: str) -> dict[str, Any]:
    return _panel(title, what, "s", [(_quantile(share, metric), f"{{{{tier}}}} {name}") for share, name in _SHARES])


def _panel(
    title: str,
    what: str,
    unit: str,
    queries: list[tuple[str, str]],
    *,
    kind: str = "timeseries",
    top: float | None = None,
) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": unit, "min": 0}
    if top is not None:
        defaults["max"] = top
    defaults["custom"] = {"lineWidth": 2, "fillOpacity": 6, "showPoints": "never", "spanNulls": False}
    return {
        "type": "timeseries",
        "title": title,
        "description": what,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + n), "expr": expression, "legendFormat": legend, "datasource": _SOURCE}
            for n, (expression, legend) in enumerate(queries)
        ],
    }


def _rows() -> list[tuple[str, list[dict[str, Any]]]]:
    good, counted = "nitsum_goodput_requests_total", "nitsum_slo_requests_total"
    return [
        (
            "Targets",
            [
                _panel(
                    "Attainment",
                    "Share of requests that met both targets of their tier.",
                    "percentunit",
                    [(f"{_rate(good, _TIER, 'tier')} / {_rate(counted, _TIER, 'tier')}", "{{tier}}")],
                    top=1,
                ),
                _panel(
                    "Goodput", "Requests per second that met both.", "reqps", [(_rate(good, _TIER, "tier"), "{{tier}}")]
                ),
                _latency("Time to first token", "nitsum_time_to_first_token_seconds", "Arrival to first token."),
                _latency("Time per output token", "nitsum_time_per_output_token_seconds", "Mean of a request."),
            ],
        ),
        (
            "Requests",
            [
                _panel(
                    "Running and waiting",
                    "Requests by where they are.",
                    "short",
                    [
                        (f"sum by (tier) (nitsum_num_requests_running{{{_TIER}}})", "{{tier}} running"),
                        (f"sum by (tier) (nitsum_num_requests_waiting{{{_TIER}}})", "{{tier}} waiting"),
                    ],
                ),
                _latency("Time in the queue", "nitsum_request_queue_time_seconds", "Arrival to admission."),
                _panel(
                    "Ends and refusals",
                    "Requests by how they ended, and those that were not taken.",
                    "reqps",
                    [
                        (_rate("nitsum_request_success_total", _TIER, "finished_reason"), "{{finished_reason}}"),
                        (_rate("nitsum_requests_refused_total", _TIER, "reason"), "refused: {{reason}}"),
                        (_rate("nitsum_calls_refused_total", _HERE, "reason"), "caller: {{reason}}"),
                    ],
                ),
                _latency("End to end", "nitsum_e2e_request_latency_seconds", "Arrival to end."),
                _panel(
                    "Tokens",
                    "Per second.",
                    "short",
                    [
                        (_rate("nitsum_prompt_tokens_total", _TIER, "model_name"), "prompt"),
                        (_rate("nitsum_generation_tokens_total", _TIER, "model_name"), "output"),
                    ],
                ),
                _panel(
                    "KV cache",
                    "Share of blocks in use, and of prompt tokens that the prefix cache had.",
                    "percentunit",
                    [
                        (f"nitsum_kv_cache_usage_perc{{{_HERE}}}", "in use, {{instance}}"),
                        (
                            f"{_rate('nitsum_prefix_cache_hits_total', _HERE, 'instance')} / "
                            f"{_rate('nitsum_prefix_cache_queries_total', _HERE, 'instance')}",
                            "prefix hits, {{instance}}",
                        ),
                    ],
                    top=1,
                ),
            ],
        ),
        (
            "Layout",
            [
                _panel(
                    "Instances",
                    "By tensor parallelism and role.",
                    "short",
                    [(f"sum by (tp, role) (nitsum_instances{{{_HERE}}})", "TP {{tp}} {{role}}")],
                ),
                _panel(
                    "Switches",
                    "Of the layout, and decisions about it, per minute.",
                    "short",
                    [
                        (f"60 * {_rate('nitsum_layout_switches_total', _HERE, 'model_name')}", "switches"),
                        (f"60 * {_rate('nitsum_layout_decisions_total', _HERE, 'model_name')}", "decisions"),
                        (f"60 * {_rate('nitsum_switch_failures_total', _HERE, 'model_name')}", "failed"),
                    ],
                ),
                _panel(
                    "Stall of a switch",
                    "Time in which sequences produced no token because of it.",
                    "s",
                    [(_quantile(share, "nitsum_switch_stall_seconds", _HERE, "le"), name) for share, name in _SHARES],
                ),
                _panel(
                    "Bytes moved",
                    "By switches, between devices, per second.",
                    "Bps",
                    [(_rate("nitsum_bytes_moved_total", _HERE, "kind"), "{{kind}}")],
                ),
                _panel(
                    "Planning",
                    "Time to choose a layout.",
                    "s",
                    [(_quantile(share, "nitsum_plan_seconds", _HERE, "le"), name) for share, name in _SHARES],
                ),
                _panel(
                    "Compilations",
                    "Of this process. After warm-up the line must be flat.",
                    "short",
                    [(f"nitsum_compiles_total{{{_HERE}}}", "{{instance}}")],
                ),
            ],
        ),
    ]


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in _rows():
        panels.append(
            {
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": 24, "x": 0, "y": y},
                "panels": [],
            }
        )
        y += 1
        width = 24 // (4 if len(row) == 4 else 3)
        for n, panel in enumerate(row):
            per_row = 24 // width
            place = {"h": 8, "w": width, "x": n % per_row * width, "y": y + n // per_row * 8}
            panels.append({**panel, "gridPos": place})
        y += 8 * -(-len(row) // (24 // width))
    for number, panel in enumerate(panels, 1):
        panel["id"] = number

    def choice(name: str, label: str) -> dict[str, Any]:
        return {
            "name": name,
            "label": name,
            "type": "query",
            "datasource": _SOURCE,
            "query": f"label_values(nitsum_slo_requests_total, {label})",
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        }

    return {
        "title": "nitsum-jax",
        "uid": "nitsum-jax",
        "schemaVersion": 39,
        "tags": ["llm", "serving"],
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus"},
                choice("model", "model_name"),
                choice("tier", "tier"),
            ]
        },
        "annotations": {
            "list": [
                {
                    "name": "switches",
                    "enable": True,
                    "datasource": _SOURCE,
                    "expr": f"changes(nitsum_layout_switches_total{{{_HERE}}}[1m]) > 0",
                    "iconColor": "purple",
                    "titleFormat": "the layout changed",
                }
            ]
        },
        "panels": panels,
    }


def text() -> str:
    """The file."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"{PATH.relative_to(ROOT)}\n")
