"""A page that shows the cell live, and what feeds it."""
