"""PTEC: prompt tuning with an embedding classification head (Buchner et al., NAACL 2024, arXiv 2309.12075).

Soft tokens P (s, d) at the input; instead of the LM head a linear map reads the instruction's last token (R):

    p(c | x) = softmax(W h_n + b)_c        h_n the state of x_n after the last layer and its norm, W (C, d), b (C)

Both are trained on the cross-entropy of the label, the head at a rate of its own (R). The soft tokens start from the
label words' embeddings (R), the head as torch draws a linear map, with a bias (I). Scores are log-probabilities: they
sum to 1 over the labels, one pass scores them all, and none but a label can be predicted.

The authors' multi-label form (a binary cross-entropy for each label) is left out: a task's row has one label here.
`generate` still decodes through the LM head, which nothing has tuned.

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from iapt.config.fields import at_least
from iapt.data.batch import Batch
from iapt.methods.labels import LabelPromptConfig, label_loss, start_of
from iapt.methods.prompt_tuning import PromptTuning
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.method import Passes


@dataclass
class PtecConfig(LabelPromptConfig):
    """The settings of PTEC. `head_learning_rate` is the head's, `learning_rate` the soft tokens'."""

    learning_rate: float = at_least(3e-2, 0)
    head_learning_rate: float = at_least(1e-3, 0)


class Ptec(PromptTuning):
    """The method's module: `prompt` (s, d) and `head`, a linear map d -> C, both in float32."""

    has_objective = True
    scores_labels = True

    def __init__(self, config: PtecConfig, start: Tensor) -> None:
        super().__init__(start, config.position)
        self.head = nn.Linear(start.shape[1], len(config.label_words))
        self.lr_overrides = {"head": config.head_learning_rate}

    def objective(self, model: Passes, batch: Batch) -> Tensor:
        return label_loss(self._logits(model, batch), batch)

    def label_scores(self, model: Passes, batch: Batch) -> Tensor:
        """(B, C) log-probabilities. Raises ValueError for a batch with another number of choices."""
        assert batch.choice_ids is not None
        if (labels := self.head.out_features) != batch.choice_ids.shape[1]:
            raise ValueError(f"the head knows {labels} labels, the batch has {batch.choice_ids.shape[1]} choices")
        return self._logits(model, batch).log_softmax(-1)

    def _logits(self, model: Passes, batch: Batch) -> Tensor:
        return self.head(model.instruction_states(batch).to(self.head.weight.dtype))


def build(config: PtecConfig, backbone: Backbone) -> Ptec:
    """Raises UserError if the label words have no tokens."""
    return Ptec(config, start_of(config, backbone))


def count(config: PtecConfig, backbone: Backbone) -> int:
    """s d + C (d + 1)."""
    d = backbone.embedding_size
    return config.num_soft_tokens * d + len(config.label_words) * (d + 1)


register("ptec", MethodSpec(PtecConfig, build, count))
