"""A task's splits as token ids, in the words that the method puts them in."""

from __future__ import annotations

import dataclasses

from iapt.config.schema import Config
from iapt.data.batch import Encoded, encode_examples
from iapt.data.spelling import Speller
from iapt.data.task import Task
from iapt.methods.registry import spec_of
from iapt.model.backbone import Backbone

NO_LIMIT = 10**9


def generates(config: Config) -> bool:
    """Whether predictions are decoded, not chosen by the scores of label words."""
    return not config.task.label_column or config.task.scoring != "likelihood"


def present(config: Config, task: Task, backbone: Backbone, soft_tokens: int) -> Task:
    """The task as the method presents it: itself, unless the method is made of text.

    An instruction too long for the backbone or `trainer.max_length` would lose its beginning, and half a
    demonstration with it. Such an instruction is presented with fewer of the method's `shots`, down to none.
    """
    method, rewrite = config.method, spec_of(config.method).rewrite
    if rewrite is None:
        return task
    made = rewrite(method, task, config.seed)
    shots = getattr(method, "shots", 0)
    shortened = 0
    for fewer in range(shots - 1, -1, -1):
        cut = _cut(config, made, backbone, soft_tokens)
        if not any(cut.values()):
            break
        shortened = max(shortened, sum(map(len, cut.values())))
        shorter = rewrite(dataclasses.replace(method, shots=fewer), task, config.seed)  # type: ignore[call-arg]
        for split, places in cut.items():
            for place in places:
                made.splits[split][place] = shorter.splits[split][place]
    if not shortened:
        return made
    total = sum(map(len, made.splits.values()))
    word = f"{shortened} of {total} instructions have fewer than {shots} demonstrations: no more fit"
    return dataclasses.replace(made, notes=[*made.notes, word])


def encode(
    config: Config, task: Task, backbone: Backbone, soft_tokens: int, *, limited: bool = True
) -> tuple[dict[str, list[Encoded]], list[str]]:
    """Tokenise every split.

    Args:
        soft_tokens: columns of the context that the method needs for itself.
        limited: False to cut nothing, however long.

    Returns:
        The encoded splits, and what the user should be told about them.

    Raises:
        UserError: what `encode_examples` raises, and a label word that no generated text can show.
    """
    items, notes = {}, list(task.notes)
    for split, examples in task.splits.items():
        items[split], words = encode_examples(
            examples,
            backbone.tokenizer,
            choices=task.choices,
            separator=config.task.separator,
            max_length=config.trainer.max_length if limited else NO_LIMIT,
            max_response_length=config.trainer.max_response_length,
            context=backbone.context if limited else None,
            room=soft_tokens,
            max_new_tokens=config.task.max_new_tokens if generates(config) else 0,
        )
        notes += [f"{split}: {word}" for word in words]
        if task.choices and config.task.scoring == "generation":  # what cannot be told is said before training
            Speller(backbone.tokenizer, items[split]).label_words(task.choices, items[split][0].choices)
    return items, notes


def _cut(config: Config, task: Task, backbone: Backbone, soft_tokens: int) -> dict[str, list[int]]:
    """The positions in each split whose instructions lose tokens."""
    kept, _ = encode(config, task, backbone, soft_tokens)
    whole, _ = encode(config, task, backbone, soft_tokens, limited=False)
    return {
        split: [i for i, (a, b) in enumerate(zip(items, whole[split], strict=True)) if a.instruction != b.instruction]
        for split, items in kept.items()
    }
