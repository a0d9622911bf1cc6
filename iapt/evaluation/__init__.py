"""A trained model scored on the examples of a task."""
