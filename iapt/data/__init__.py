"""Tasks: from rows of files and the hub to examples, tokens and batches."""
