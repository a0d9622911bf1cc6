"""Pure modules without knowledge of methods."""
