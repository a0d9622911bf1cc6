"""Benchmarks on a trained adapter: lm-evaluation-harness and MT-Bench."""
