"""A weighted verbaliser: several terms speak for a label (SciPrompt, You et al., EMNLP 2024, arXiv 2410.01946).

    score(c | x) = sum_j w_cj log p(v_cj | P, x)        sum_j w_cj = 1, v_c1 the label word itself

The mean of the terms' log-probabilities is the reference's (R), and so is that a correlation of term and label weighs
them; there a sentence encoder measures it, here the frozen backbone's embedding table (I): w_cj is proportional to the
cosine of the terms' mean embeddings, negative ones counting as 0. Terms are scored by their whole token strings, as
label words are (I; the reference tunes a masked LM that fills one place). Trained are soft tokens P at the input (I;
there, the whole LM), on the cross-entropy of softmax(score).

Terms are given in `method.words`; with none this is plain scoring. How the authors find them, retrieval from knowledge
bases and filtering by two encoders fitted to the domain, is left out.

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from iapt.config.fields import at_least, choice
from iapt.data.batch import Batch
from iapt.data.task import Task
from iapt.methods.labels import LabelPromptConfig, label_loss, start_of
from iapt.methods.prompt_tuning import PromptTuning
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.method import Passes


@dataclass
class SciPromptConfig(LabelPromptConfig):
    """The verbaliser.

    Attributes:
        words: label word -> the terms that speak for it besides itself.
        weighting: `similarity` to the label word in the embedding table, or `uniform`.
        normalize_terms: divide a term's log-probability by its number of tokens, as the reference does (R).
    """

    learning_rate: float = at_least(3e-2, 0)
    words: dict[str, list[str]] = field(default_factory=dict)
    weighting: str = choice("similarity", "similarity", "uniform")
    normalize_terms: bool = False

    def terms(self) -> list[list[str]]:
        """Each label's terms, the label word first."""
        return [[word, *self.words.get(word, ())] for word in self.label_words]

    def problems(self) -> list[str]:
        known = ", ".join(self.label_words)
        found = [
            f"method.words.{key}: no label word; allowed are {known}" for key in set(self.words) - set(self.label_words)
        ]
        flat = [term for terms in self.terms() for term in terms]
        found += [
            f"method.words: {term!r} occurs {flat.count(term)} times; a term speaks for one label, once"
            for term in dict.fromkeys(flat)
            if flat.count(term) > 1
        ]
        return found


class SciPrompt(PromptTuning):
    """The method's module. `prompt` (s, d) is what is trained.

    Attributes:
        weights: (K,) float32 buffer, of all labels' terms one after another.
        owners: (K,) int64 buffer, the label that each speaks for; not saved.
    """

    has_objective = True
    scores_labels = True

    weights: Tensor
    owners: Tensor

    def __init__(self, config: SciPromptConfig, start: Tensor, weights: list[Tensor]) -> None:
        super().__init__(start, config.position)
        self.normalize_terms = config.normalize_terms
        self.labels = len(weights)
        self.register_buffer("weights", torch.cat(weights))
        owners = torch.arange(self.labels).repeat_interleave(torch.tensor(list(map(len, weights))))
        self.register_buffer("owners", owners, persistent=False)

    def objective(self, model: Passes, batch: Batch) -> Tensor:
        return label_loss(self._scores(model, batch), batch)

    def label_scores(self, model: Passes, batch: Batch) -> Tensor:
        """(B, C) weighted means of the terms' log-probabilities, in nats.

        Args:
            batch: its choices are all labels' terms, one after another.

        Raises:
            ValueError: if there are not as many choices as terms.
        """
        return self._scores(model, batch)

    def _scores(self, model: Passes, batch: Batch) -> Tensor:
        found = model.likelihoods(batch)
        if found.shape[1] != len(self.weights):
            raise ValueError(f"there are {len(self.weights)} terms, the batch has {found.shape[1]} choices")
        if self.normalize_terms:
            assert batch.choice_mask is not None
            found = found / batch.choice_mask.sum(-1)
        return found.new_zeros(len(found), self.labels).index_add(1, self.owners, found * self.weights)


def rewrite(config: SciPromptConfig, task: Task, seed: int) -> Task:
    """The task with all labels' terms as its choices; rows and their labels stay."""
    terms = [term for terms in config.terms() for term in terms]
    return dataclasses.replace(task, config=dataclasses.replace(task.config, label_words=terms))


def weigh(config: SciPromptConfig, backbone: Backbone) -> list[Tensor]:
    """Each label's weights (its number of terms,) float32, which sum to 1."""

    def embedding(term: str) -> Tensor:
        ids = torch.tensor(backbone.tokenizer.encode(term, add_special_tokens=False), dtype=torch.long)
        return backbone.embed(ids.to(backbone.embeddings.weight.device)).detach().float().mean(0).cpu()

    found = []
    for terms in config.terms():
        weights = torch.ones(len(terms))
        if config.weighting == "similarity":
            label, *others = map(embedding, terms)
            weights[1:] = torch.tensor([float(F.cosine_similarity(label, other, dim=0)) for other in others]).clamp(
                min=0
            )
        found.append(weights / weights.sum())
    return found


def build(config: SciPromptConfig, backbone: Backbone) -> SciPrompt:
    """Raises UserError if the label words have no tokens."""
    return SciPrompt(config, start_of(config, backbone), weigh(config, backbone))


def count(config: SciPromptConfig, backbone: Backbone) -> int:
    """s e."""
    return config.num_soft_tokens * backbone.embedding_size


register("sciprompt", MethodSpec(SciPromptConfig, build, count, rewrite))
