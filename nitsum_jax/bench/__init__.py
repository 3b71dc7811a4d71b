"""Measurements that a user runs on the own machine: `nitsum-bench`."""
