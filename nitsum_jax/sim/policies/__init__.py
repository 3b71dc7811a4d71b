"""Policies that are compared: static layouts, baselines, searches over them, and bounds."""
