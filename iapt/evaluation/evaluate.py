"""Splits to predictions to metrics. Batches are cut the same way however many processes share them, so a score does
not depend on their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from iapt.config.errors import UserError
from iapt.config.task import TaskConfig
from iapt.data.batch import Batch, Encoded, collate, evaluation_batches
from iapt.data.spelling import Speller
from iapt.data.task import Example
from iapt.evaluation.calibration import expected_calibration_error
from iapt.evaluation.trie import tries
from iapt.metrics import metrics
from iapt.model.adapted import AdaptedModel

Predict = Callable[[Batch], list[dict[str, Any]]]  # one record a row


@dataclass
class Evaluation:
    """One split's outcome.

    Attributes:
        values: metric name -> fraction of 1 (plus text entries such as sacrebleu's signature).
        predictions: one JSON-able record an example, in the split's order.
    """

    values: dict[str, Any]
    predictions: list[dict[str, Any]]


def mean_loss(model: AdaptedModel, items: Sequence[Encoded], batch_size: int, accelerator: Accelerator) -> float:
    """The mean negative log-likelihood of all response tokens, in nats."""

    def total(batch: Batch) -> list[float]:
        return [float(model.loss(batch, "sum"))]

    sums = _over_batches(model, items, batch_size, accelerator, total)
    return sum(s for (s,) in sums) / sum(len(item.response) for item in items)


def evaluate(
    model: AdaptedModel,
    task: TaskConfig,
    examples: Sequence[Example],
    items: Sequence[Encoded],
    batch_size: int,
    accelerator: Accelerator,
) -> Evaluation:
    """Predict every example and score the predictions.

    Classification tasks with `scoring: likelihood` predict the label whose token string is likeliest (divided by
    its length if `normalize_scores`); with `scoring: generation`, the label word that the generated text begins
    with, or none; with `scoring: constrained`, the one that decoding ends in when it cannot leave the label words. A
    row with options of its own is only ever answered with one of those. Other tasks generate. Where labels are scored
    and lengths not divided out, `ece` stands beside the metrics: the expected calibration error of the scores' softmax.

    Args:
        examples: a whole split, in its order.
        items: the same examples, encoded.

    Raises:
        UserError: a metric that does not exist or does not suit the task.
    """
    # Ranks share the layers' weights under fsdp, so none may stop decoding before the others.
    together = accelerator.num_processes > 1
    if task.label_column and task.scoring == "likelihood":
        predict = _classify(model, task, examples)
    elif task.label_column and task.scoring == "constrained":
        predict = _decode_labels(model, task, examples, together)
    else:
        predict = _generate(model, task, examples, items, together)
    predictions = _over_examples(model, items, batch_size, accelerator, predict)
    if task.label_column:
        found = [p.get("label", -1) for p in predictions]
        labels = [e.label for e in examples]
        values = metrics.compute(task.metrics, found, labels)
        if task.scoring == "likelihood" and not task.normalize_scores:
            values["ece"] = expected_calibration_error([p["scores"] for p in predictions], found, labels)
    else:
        texts, references = [p["text"] for p in predictions], [list(e.references) for e in examples]
        values = metrics.compute(task.metrics, texts, references, task.metric_tokenizer)
    records = [
        {
            "index": index,
            "instruction": example.instruction,
            **prediction,
            **({"reference": example.response} if task.label_column else {"references": list(example.references)}),
        }
        for index, (example, prediction) in enumerate(zip(examples, predictions, strict=True))
    ]
    return Evaluation(values, records)


def _classify(model: AdaptedModel, task: TaskConfig, examples: Sequence[Example]) -> Predict:
    def predict(batch: Batch) -> list[dict[str, Any]]:
        scores = model.score(batch)
        ranked = scores
        if task.normalize_scores:
            assert batch.choice_mask is not None
            ranked = scores / batch.choice_mask.sum(-1)
        records = []
        for index, row, compared in zip(batch.indices.tolist(), scores.cpu(), ranked.cpu(), strict=True):
            own = slice(examples[index].num_choices)
            label = int(compared[own].argmax())
            word = task.label_words[label]
            records.append({"label": label, "text": word, "scores": [round(s, 6) for s in row[own].tolist()]})
        return records

    return predict


def _generate(
    model: AdaptedModel, task: TaskConfig, examples: Sequence[Example], items: Sequence[Encoded], together: bool
) -> Predict:
    speller = Speller(model.backbone.tokenizer, items)
    words = speller.label_words(task.label_words, items[0].choices) if task.label_column else []

    def predict(batch: Batch) -> list[dict[str, Any]]:
        ids = model.generate(batch, max_new_tokens=task.max_new_tokens, num_beams=task.num_beams, synced_gpus=together)
        texts = speller.texts(ids.tolist())
        if not task.label_column:
            return [{"text": text} for text in texts]
        counts = [examples[index].num_choices for index in batch.indices.tolist()]
        return [
            {"text": text, "label": _begins_with(text, words[:count])}
            for text, count in zip(texts, counts, strict=True)
        ]

    return predict


def _decode_labels(model: AdaptedModel, task: TaskConfig, examples: Sequence[Example], together: bool) -> Predict:
    stop = model.backbone.tokenizer.eos_token_id
    if stop is None:
        raise UserError("task.scoring = constrained: a label word ends in eos, and the tokenizer has none")

    def predict(batch: Batch) -> list[dict[str, Any]]:
        own = tries(batch, stop, [examples[index].num_choices for index in batch.indices.tolist()])
        width = batch.instruction_ids.shape[1]
        ids = model.generate(
            batch,
            max_new_tokens=max(trie.depth for trie in own),
            num_beams=task.num_beams,
            eos_token_id=stop,
            # Beams are compared as likelihoods are: as they stand, or divided by their lengths.
            length_penalty=float(task.normalize_scores),
            prefix_allowed_tokens_fn=lambda row, seen: own[row].following(seen[width:].tolist()),
            synced_gpus=together,
        )
        labels = [trie.find(row) for trie, row in zip(own, ids.tolist(), strict=True)]
        return [{"text": task.label_words[label], "label": label} for label in labels]

    return predict


def _begins_with(text: str, words: Sequence[tuple[str, ...]]) -> int:
    """The longest label word that `text` begins with, in one of its spellings; -1, which equals no label: none."""
    fitting = [(len(form), -index) for index, forms in enumerate(words) for form in forms if text.startswith(form)]
    return -max(fitting)[1] if fitting else -1


def _over_examples(
    model: AdaptedModel,
    items: Sequence[Encoded],
    batch_size: int,
    accelerator: Accelerator,
    predict: Predict,
) -> list[dict[str, Any]]:
    """One record an example, in the split's order."""
    batches = evaluation_batches(items, batch_size)
    results = _over_batches(model, items, batch_size, accelerator, predict)
    ordered = {
        index: record
        for indices, records in zip(batches, results, strict=True)
        for index, record in zip(indices, records, strict=True)
    }
    return [ordered[index] for index in range(len(items))]


def _over_batches(
    model: AdaptedModel,
    items: Sequence[Encoded],
    batch_size: int,
    accelerator: Accelerator,
    work: Callable[[Batch], list[Any]],
) -> list[list[Any]]:
    """Apply `work` to every batch of `items`, dealt out over the processes; every process gets all
    results, in order.
    """
    batches = evaluation_batches(items, batch_size)
    world, rank = accelerator.num_processes, accelerator.process_index
    rounds = -(-len(batches) // world)
    model.train(False)
    own = []
    with torch.no_grad():
        for turn in range(rounds):
            # Every process runs equally many batches, since sharded layers wait for each other; surplus is dropped.
            number = min(turn * world + rank, len(batches) - 1)
            batch = collate([items[i] for i in batches[number]], model.backbone.pad_id)
            own.append((number, work(batch.to(accelerator.device))))
    found = dict(gather_object(own))
    return [found[number] for number in range(len(batches))]
