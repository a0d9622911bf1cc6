"""The name of every file in the folder of a run, of an evaluation and of a sweep."""

from __future__ import annotations

CONFIG = "config.yaml"  # the resolved configuration, written by whoever starts the run
METRICS = "metrics.jsonl"  # losses by step
STATE = "state/latest.pt"  # what an interrupted run continues from; gone once it has finished
ADAPTER = "adapter.safetensors"  # the best adapter, float32
META = "adapter.json"  # its schema version, method, backbone identity, template hash, the run's whole configuration
PREDICTIONS = "predictions.jsonl"  # one record for each example of the split that was scored
ACTIVATIONS = "activations.json"  # each layer's activation as it was learned
ACTIVATIONS_PICTURE = "activations.png"
SUMMARY = "summary.json"  # the result; `status: ok` marks the folder as finished

HARNESS = "harness.json"  # all that lm-evaluation-harness reports
HARNESS_SAMPLES = "harness_samples.jsonl"  # every example and answer of its tasks
ANSWERS = "answers.jsonl"  # MT-Bench's files
JUDGMENTS = "judgments.jsonl"
MT_BENCH = "mt_bench.json"  # what the answers were made from

CELL = "cell.json"  # of a run in a sweep: which cell it is; locked while a process works on it
OUTPUT = "output.log"  # what the run of a cell prints; the terminal belongs to the whole sweep
JOBS = ".jobs.jsonl"  # in the sweep's folder: each job of whatever launcher appends a line when it ends
LOCK = ".lock"  # in the sweep's folder: held while a job looks for its cell
