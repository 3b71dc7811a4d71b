"""The decoder and its arithmetic, whose bits do not depend on the layout."""
