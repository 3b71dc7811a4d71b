"""Planning for a cell of several nodes, whose candidates cannot be listed."""
