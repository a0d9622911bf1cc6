"""The training loop: batches of a phase, steps, selection of the best adapter, logging."""
