"""The engine's policy by latency tiers: control's scheduler over live instances, and what it predicts with."""
