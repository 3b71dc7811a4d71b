"""Anthropic's Messages API, and its counting of tokens."""
