"""Which cell of many takes a request, by what the cells report."""
