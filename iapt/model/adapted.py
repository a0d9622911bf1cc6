"""AdaptedModel: a frozen backbone joined with one method, and three verbs: `loss`, `score`, `generate`.

How soft tokens enter and which passes that takes is `iapt.model.engine`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iapt.config.errors import UserError
from iapt.data.batch import Batch
from iapt.folder.summary import refuse_finished
from iapt.model.backbone import Backbone
from iapt.model.checkpoint import save_adapter
from iapt.model.decoding import behind_prefix, new_tokens, plan_decoding
from iapt.model.engine import Engine, Prefix
from iapt.model.method import Method, WeightMethod


class AdaptedModel(nn.Module):
    """A frozen backbone and one method.

    Args:
        backbone: the frozen LM; hooks are registered on its decoder layers, `detach` removes them.
        method: a prompt-space or weight-space method, or None for the bare backbone.
        precision: `bf16` runs everything under autocast; adapters stay float32 either way, because updates at
            small learning rates vanish in bfloat16.
        activation_checkpointing: recompute layer activations in the backward pass.
        meta: what `save` writes about the adapter: its method and the identity of the bare backbone.

    Attributes:
        preflight: what `iapt.preflight` found on this model, None if it was not asked.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method | None,
        *,
        precision: str = "fp32",
        activation_checkpointing: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.meta = meta
        self.preflight: dict[str, Any] | None = None
        self.backbone = backbone
        self.lm = backbone.lm
        self.method = method.to(backbone.lm.device) if method is not None else None
        autocast = torch.bfloat16 if precision == "bf16" else None
        self.engine = Engine(backbone, self.method, autocast, activation_checkpointing)
        self.train(False)

    # -- what is trained ----------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters under the names they are saved by."""
        return self.method.trainable() if self.method else {}

    def parameter_groups(self, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The trained parameters for an optimiser: the shared group first, then one for each of `lr_overrides`."""
        rates = self.method.lr_overrides if self.method else {}
        members: dict[str | None, list[nn.Parameter]] = {prefix: [] for prefix in (None, *rates)}
        for name, parameter in self.trainable().items():
            members[next((prefix for prefix in rates if name.startswith(prefix)), None)].append(parameter)
        return [
            {
                "name": prefix or "",
                "params": parameters,
                "lr": learning_rate if prefix is None else rates[prefix],
                "weight_decay": weight_decay if prefix is None else 0.0,
            }
            for prefix, parameters in members.items()
            if parameters
        ]

    def adapter_state(self) -> dict[str, Tensor]:
        """Everything the method owns, trained or not: name -> float32 copy on the CPU."""
        return {k: v.detach().float().cpu().clone().contiguous() for k, v in self._owned().items()}

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Put a saved state back. Raises ValueError naming missing, surplus and misshapen tensors."""
        own = self._owned()
        wrong = set(own) ^ set(state) | {k for k in set(own) & set(state) if own[k].shape != state[k].shape}
        if wrong:
            names = ", ".join(sorted(wrong)[:6])
            raise ValueError(f"the adapter's tensors do not fit this method and backbone: {names}")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])

    def save(self, path: str | Path) -> None:
        """Write adapter.safetensors and adapter.json, as a run does, for `iapt.load`.

        Args:
            path: a folder, made if missing; an adapter in it is replaced.

        Raises:
            UserError: if the folder holds a finished run, whose summary would then describe another adapter.
            ValueError: if the model was built without `meta`; `iapt.attach` and `iapt.load` give it.
        """
        if self.meta is None:
            raise ValueError("this model was built without meta, so its adapter could not be told from others")
        folder = Path(path)
        refuse_finished(folder, "path")
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(folder, self.adapter_state(), self.meta)

    def _acting(self) -> Method | None:
        """The method, unless it is switched off."""
        return self.method if self.engine.active else None

    def _owned(self) -> dict[str, Tensor]:
        if self.method is None:
            return {}
        return dict(self.method.trainable()) | dict(self.method.state_dict())

    def train(self, mode: bool = True) -> AdaptedModel:
        """Train mode of the method only: dropout inside a frozen backbone would be noise, not regularisation."""
        super().train(False)
        self.training = mode
        if self.method is not None:
            self.method.train(mode)
        self.engine.train(mode)
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Return a context in which this is the bare backbone."""
        was, self.engine.active = self.engine.active, False
        with self.method.disabled() if isinstance(self.method, WeightMethod) else nullcontext():
            try:
                yield
            finally:
                self.engine.active = was

    def detach(self) -> None:
        """Take the soft tokens' hooks off the backbone; what a weight-space method put into it stays. The object is of
        no use afterwards."""
        self.engine.hooks.remove()

    def prefill(self, batch: Batch) -> Prefix:
        """Run the instruction, and the soft tokens with it, up to but not including its last token."""
        return self.engine.prefill(batch)

    def response_logits(self, batch: Batch) -> Tensor:
        """(B, R, V): the logits that predict each response token, in one pass with gradient."""
        return self.engine.response_logits(batch)

    def instruction_states(self, batch: Batch) -> Tensor:
        """(B, d): the last hidden states of the instructions' last tokens, with gradient."""
        return self.engine.instruction_states(batch)

    # -- the three verbs ----------------------------------------------------------------------------------

    def loss(self, batch: Batch, reduction: str = "mean") -> Tensor:
        """Return what training minimises, a scalar in float32 or better. It is the cross-entropy of the response
        tokens given the instruction, in nats, unless the method has an objective of its own.

        Args:
            batch: instructions and responses.
            reduction: `mean` over the response tokens of the batch, or `sum` over them (what gradient
                accumulation and several processes need, since their shares hold unequal numbers of tokens).
        """
        method = self._acting()
        total = method.objective(self, batch) if method and method.has_objective else None
        if total is None:
            total = cross_entropy(self.engine.response_logits(batch), batch)
        return total if reduction == "sum" else total / batch.response_mask.sum()

    forward = loss

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """Log-likelihood of every choice of every row, summed over its tokens, unless the method scores otherwise.

        Args:
            batch: with `choice_ids` (B, C, T) and their mask; its responses are not looked at.

        Returns:
            (B, C) float32, in nats.

        Raises:
            ValueError: if the batch carries no choices.
        """
        if batch.choice_ids is None or batch.choice_mask is None:
            raise ValueError("score needs a batch with choices")
        method = self._acting()
        own = method.label_scores(self, batch) if method and method.scores_labels else None
        if own is not None:
            return own
        found = self.likelihoods(batch)
        return method.adjust_scores(found) if method and method.adjusts_scores else found

    def likelihoods(self, batch: Batch) -> Tensor:
        """The log-likelihoods that `score` compares unless the method scores otherwise, with gradient.

        Raises:
            ValueError: if the batch carries no choices.
        """
        if batch.choice_ids is None or batch.choice_mask is None:
            raise ValueError("score needs a batch with choices")
        # Where nothing can be continued, or layers that are recomputed would write their keys twice: a row a choice.
        if self.engine.one_pass or (self.engine.checkpointing and self.training):
            copies = batch.choice_ids.shape[1]
            ids, mask = batch.choice_ids.flatten(0, 1), batch.choice_mask.flatten(0, 1)
            shown, seen, rows = (
                t.repeat_interleave(copies, 0) for t in (batch.instruction_ids, batch.instruction_mask, batch.indices)
            )
            logits = self.engine.response_logits(Batch(shown, seen, ids, mask, None, None, rows))
            return _summed(logits, ids, mask).view(-1, copies)
        prefix = self.prefill(batch)
        scores = []
        for ids, mask in zip(batch.choice_ids.unbind(1), batch.choice_mask.unbind(1), strict=True):
            scores.append(_summed(self.engine.extend(prefix, ids, mask), ids, mask))
        return torch.stack(scores, dim=1)

    @torch.no_grad()
    def generate(
        self,
        batch: Batch | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Decode a response for every row from the encoded prefix.

        After the prefix stands, decoding is the bare backbone's own `generate`: greedy, beams, sampling. It obeys the
        options alone: the backbone's own generation config has no part in it unless it is given as one
        (`generation_config=lm.generation_config`). See `iapt.model.decoding`.

        Args:
            batch: its responses are not looked at.
            input_ids: (B, N) int64 instructions, instead of a batch.
            attention_mask: (B, N), 1 or True at their tokens, wherever the padding is. None: as in transformers,
                every token but the pad token, or all of them where eos is the pad token.
            options: transformers' generation options (`max_new_tokens`, `num_beams`, `do_sample`, penalties,
                `logits_processor`, `streamer` ...). As in plain transformers those that look at ids see the whole
                instruction, left-padded, without columns for soft tokens; `max_length` counts it too.

        Returns:
            (B, T) int64 token ids, the new ones alone, right-padded; with `return_dict_in_generate` transformers'
            ModelOutput, whose `sequences` they are, without its cache.

        Raises:
            UserError: neither or both of batch and input_ids, a row of fewer than 2 tokens, an option that is unknown
                or cannot work from a prefilled cache.
        """
        if (batch is None) == (input_ids is None):
            raise UserError("generate: give either a batch or input_ids")
        if batch is None:
            assert input_ids is not None
            options.pop("token_type_ids", None)  # tokenizers return them unasked
            batch = _instructions(input_ids, attention_mask, self.backbone.tokenizer).to(self.lm.device)
        width = batch.instruction_ids.shape[1]
        decoding = plan_decoding(options, self.backbone, width)
        prefix = self.prefill(batch)
        # transformers repeats ids and mask for beams or samples, but not a cache that it is handed.
        if decoding.copies > 1:
            prefix.cache.batch_repeat_interleave(decoding.copies)
            if prefix.plan is not None:
                prefix.plan.repeat(decoding.copies)
        with self.engine.continuing(prefix), behind_prefix(self.lm):
            output = self.lm.generate(
                input_ids=batch.instruction_ids,
                attention_mask=torch.cat([prefix.mask, batch.instruction_mask[:, -1:]], 1).long(),
                generation_config=decoding.config,
                **{self.engine.arguments.cache: prefix.cache, **decoding.arguments},
            )
        return new_tokens(output, width)


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Summed over the response tokens, in nats, a scalar in float32 or better; logits (B, R, V) predict them."""
    targets = batch.response_ids.masked_fill(~batch.response_mask, -100)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def _summed(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-likelihoods (B,) float32 of ids (B, T), which logits (B, T, V) predict."""
    chosen = logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return (chosen * mask).sum(-1)


def _instructions(ids: Tensor, mask: Tensor | None, tokenizer: Any) -> Batch:
    """Ids and mask (B, N), padded anywhere, as a batch without responses."""
    if mask is None:
        pad = tokenizer.pad_token_id
        mask = ids != pad if pad != tokenizer.eos_token_id else torch.ones_like(ids)
    mask = mask.bool()
    lengths = mask.sum(1)
    if ids.shape != mask.shape or int(lengths.min()) < 2:
        raise UserError("input_ids: every row needs at least 2 tokens, and attention_mask the same shape")
    order = mask.long().argsort(dim=1, stable=True)[:, -int(lengths.max()) :]  # padding first, tokens in their order
    none = ids.new_zeros(len(ids), 0)
    rows = torch.arange(len(ids), device=ids.device)
    return Batch(ids.gather(1, order), mask.gather(1, order), none, none.bool(), None, None, rows)
