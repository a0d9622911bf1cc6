"""What a run leaves on disk: file names, the summary, reading and writing. Imports no torch."""
