"""The commands: parse, build, call. No logic of a run lives here."""
