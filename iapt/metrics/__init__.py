"""The scores of predictions, and which scripts they can read."""
