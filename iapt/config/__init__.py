"""Settings: their schema, their checks, and the errors that name them. Imports no torch."""
