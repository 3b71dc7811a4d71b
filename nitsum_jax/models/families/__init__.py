"""What each family of models says of itself: one file a family."""
