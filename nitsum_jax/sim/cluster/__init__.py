"""Many cells behind a router: the router of the live cluster over models of cells."""
