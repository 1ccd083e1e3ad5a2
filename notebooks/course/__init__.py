"""What only the notebooks beside it need: the set-up of each, and drawings that are too long for a cell."""
