"""Which caller may do what: API keys, limits, TLS."""
