"""From settings to a started engine: compilation cache, model and scheduling put together."""
