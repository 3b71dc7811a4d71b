"""What one step computes, what goes in, and what comes out."""
