"""What steps and switches cost, and a cell in modelled time."""
