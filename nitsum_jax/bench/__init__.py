"""Measurements that users run on their own machines: `nitsum-bench` and `nitsum-profile`."""
