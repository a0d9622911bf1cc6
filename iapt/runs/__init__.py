"""Runs as folders: build, train, evaluate, resume, start from another, sweep."""
