"""Who may call what: API keys, limits, TLS."""
