"""The passes over a backbone: where soft tokens stand, which columns a pass runs, what the cache keeps.

Soft tokens live in columns of their own. Before each decoder layer a hook overwrites what stands in those columns
with what the method answers for that layer; their keys and values then reach the layer, and the KV cache, like any
token's. No forward pass of transformers is copied, so any decoder works. Padding is on the left of everything, the
soft tokens included (behind them it would push them out of the reach of attention windows), so positions come from
the mask alone and no method ever searches for a boundary.

The two layouts, and the passes they need (the layouts are label I: docs/methods.md):

    before_instruction   [P, x_1 .. x_n, response]       the instruction sees P: one pass, gradient everywhere
    after_instruction    [x_1 .. x_n-1, P, x_n, response] it does not: one pass over x_1 .. x_n without gradient
                                                         keeps keys, values and each layer's states (the *frozen
                                                         prefix*), then only [P, x_n, response] carries gradient

In the second layout a generator reads all n states of that first, bare pass; x_n is then run again, seeing P.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from iapt.config.errors import UserError
from iapt.data.batch import Batch
from iapt.model.architecture import arguments_of, is_rewindable, takes_ids_at_every_layer
from iapt.model.backbone import Backbone
from iapt.model.cache import PassCache
from iapt.model.edits.base import Edit, Plan
from iapt.model.hooks import LayerHooks, enter
from iapt.model.method import Method, SoftPrompt


@dataclass
class Prefix:
    """An encoded instruction: everything before its last token, ready to be continued.

    Attributes:
        cache: keys and values of C columns, soft tokens among them.
        mask: (B, C) bool.
        last_ids: (B, 1) int64, the instruction's last token, with which every continuation begins.
        plan: of the passes that continue it, None where no edit has anything to do there.
    """

    cache: DynamicCache
    mask: Tensor
    last_ids: Tensor
    plan: Plan | None = None


class Engine:
    """Runs a backbone with one method's soft tokens in it, or without any.

    Args:
        backbone: hooks are registered on its decoder layers, `hooks.remove()` takes them off.
        method: whose soft tokens are written; a weight-space method, or None, has none.
        autocast: dtype to compute in, None for the backbone's own.
        checkpointing: the layers recompute their activations in the backward pass.

    Attributes:
        active: False runs the bare backbone.
        training: whether a backward pass may follow.
        one_pass: no prefix is continued, every text is run whole. So it is where the backbone's state cannot be taken
            back by a token (recurrent layers), and it is the second road to every number of the first.

    Raises:
        UserError: if the backbone lacks what the method, or any, attaches to.
    """

    def __init__(
        self, backbone: Backbone, method: Method | None, autocast: torch.dtype | None, checkpointing: bool
    ) -> None:
        self.backbone, self.lm = backbone, backbone.lm
        self.method, self.autocast, self.checkpointing = method, autocast, checkpointing
        self.active, self.training = True, False
        self.arguments = arguments_of(backbone.lm)
        self._rewindable = is_rewindable(backbone.lm)
        self.one_pass = not self._rewindable
        self.edits: Sequence[Edit] = ()
        if isinstance(method, SoftPrompt):
            self.edits = method.edits()
            self._refuse_unfit(method)
        self._reads = {edit.reads for edit in self.edits}
        self.hooks = LayerHooks(list(backbone.layers), self.edits, type(method).__name__, checkpointing)

    def _refuse_unfit(self, method: SoftPrompt) -> None:
        """Raises UserError if the backbone's layers are not of the kind that the method reaches into."""
        name, kind, backbone = type(method).__name__, type(self.lm).__name__, self.backbone
        for edit in self.edits:
            edit.check(backbone, name)
        if takes_ids_at_every_layer(self.lm):
            raise UserError(
                f"method: {name} puts soft tokens among the text, and {kind} looks every token's id up at every "
                "layer, which soft tokens do not have; weight-space methods (method=lora) can do without"
            )
        if any(edit.reads == "encoding" for edit in self.edits) and backbone.output_size != backbone.hidden_size:
            raise UserError(
                f"method: {name} reads the last hidden states as if they were a layer's, and in {kind} they are "
                f"{backbone.output_size} wide, a layer's {backbone.hidden_size}"
            )

    def train(self, mode: bool) -> None:
        """Say whether a backward pass may follow. The backbone's modules stay in eval mode."""
        self.training = mode
        self.hooks.recompute = mode and self.checkpointing

    def prefill(self, batch: Batch) -> Prefix:
        """Run the instruction, and the soft tokens with it, up to but not including its last token."""
        mask, cache, prompt, plan = batch.instruction_mask, self._new_cache(), self._prompt(), None
        with self.precision():
            if prompt is None:
                self._run(self._embed(batch.instruction_ids, mask)[:, :-1], mask[:, :-1], cache, keep_cache=True)
                mask = mask[:, :-1]
            elif prompt.position == "before_instruction":
                plan, embeds, mask = self._before(prompt, batch)
                # The last token has to run, a generator reads its states; every continuation runs it again.
                if self.one_pass:
                    plan.answers = {}
                    self._run(embeds, mask, plan=plan)
                    self._run(embeds[:, :-1], mask[:, :-1], cache, plan=plan, keep_cache=True)
                else:
                    self._run(embeds, mask, cache, plan=plan, keep_cache=True)
                    cache.crop(-1)
                mask = mask[:, :-1]
            else:
                plan, soft = self._plan_after(prompt, batch, None if self.one_pass else cache)
                embeds, mask = soft, mask[:, :-1]
                if self.one_pass:
                    plan.slots = plan.soft
                    embeds = torch.cat([self._embed(batch.instruction_ids, batch.instruction_mask)[:, :-1], soft], 1)
                else:
                    cache.crop(-1)
                mask = torch.cat([mask, soft.new_ones(soft.shape[:2], dtype=torch.bool)], 1)
                self._run(embeds, mask, cache, plan=plan, keep_cache=True)
        return Prefix(cache, mask, batch.instruction_ids[:, -1:], plan.following(cache) if plan is not None else None)

    def response_logits(self, batch: Batch) -> Tensor:
        """(B, R, V): the logits that predict each response token, in one pass with gradient."""
        # The last response token predicts nothing that is asked for.
        ids, seen = batch.response_ids[:, :-1], batch.response_mask[:, :-1]
        with self.precision():
            return self._run_whole(batch, ids, seen, keep=batch.response_ids.shape[1])

    def instruction_states(self, batch: Batch) -> Tensor:
        """(B, d): the instruction's last token after the last layer and its norm, soft tokens in place, with gradient.

        What the LM head reads to predict a response's first token; no response is looked at.
        """
        ids, seen = batch.response_ids[:, :0], batch.response_mask[:, :0]
        with self.precision():
            return self._run_whole(batch, ids, seen, keep=0)[:, -1]

    def _run_whole(self, batch: Batch, ids: Tensor, seen: Tensor, keep: int) -> Tensor:
        """Instruction, soft tokens and `ids` (B, T) with their mask `seen`, with gradient; returns what `_run` does."""
        prompt, mask, response = self._prompt(), batch.instruction_mask, self._embed(ids, seen)
        if prompt is None:
            embeds = torch.cat([self._embed(batch.instruction_ids, mask), response], 1)
            return self._run(embeds, torch.cat([mask, seen], 1), keep=keep)
        if prompt.position == "before_instruction":
            plan, embeds, mask = self._before(prompt, batch)
            return self._run(torch.cat([embeds, response], 1), torch.cat([mask, seen], 1), keep=keep, plan=plan)
        cache = None if self.one_pass else self._new_cache()
        plan, soft = self._plan_after(prompt, batch, cache)
        ones = soft.new_ones(soft.shape[:2], dtype=torch.bool)
        whole = torch.cat([mask[:, :-1], ones, mask[:, -1:], seen], 1)
        first, last = self._embed(batch.instruction_ids, mask).split([mask.shape[1] - 1, 1], dim=1)
        tail = torch.cat([soft, last, response], 1)
        if cache is None:
            plan.slots = plan.soft
            return self._run(torch.cat([first, tail], 1), whole, keep=keep, plan=plan)
        cache.crop(-1)
        return self._run(tail, whole, cache, keep=keep, plan=plan)

    def extend(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T, V) logits that predict ids (B, T) after the prefix, which is left as it was.

        Raises:
            ValueError: with `one_pass`, where nothing can be left as it was.
        """
        if self.one_pass:
            raise ValueError("this engine runs every text whole: ask `response_logits`")
        inputs = torch.cat([prefix.last_ids, ids[:, :-1]], 1)
        seen = torch.cat([prefix.mask, torch.ones_like(prefix.mask[:, :1]), mask[:, :-1]], 1)
        with self.precision():
            embeds = self._embed(inputs, seen[:, prefix.mask.shape[1] :])
            if prefix.plan is not None:
                embeds = enter(prefix.plan, embeds)
            return self._run(embeds, seen, prefix.cache, keep=ids.shape[1], plan=prefix.plan)

    @contextmanager
    def continuing(self, prefix: Prefix) -> Iterator[None]:
        """A context in which others may run the backbone behind the prefix, as `generate` does."""
        with self.hooks.entering(prefix.plan, self.backbone.embeddings), self.precision():
            yield

    def _prompt(self) -> SoftPrompt | None:
        return self.method if self.active and isinstance(self.method, SoftPrompt) else None

    def _soft_columns(self, prompt: SoftPrompt, batch: Batch) -> Tensor:
        """(B, s, d): what stands in the soft columns before the model embeds them."""
        shape = len(batch.instruction_ids), prompt.num_soft_tokens, self.backbone.embedding_size
        given = prompt.input_embeddings()
        if given is None:
            return torch.zeros(shape, dtype=self.lm.dtype, device=self.lm.device)
        return given.to(self.lm.dtype).expand(shape).clone()  # some models scale their input in place

    def _before(self, prompt: SoftPrompt, batch: Batch) -> tuple[Plan, Tensor, Tensor]:
        """The pass over [padding, P, instruction]: its plan, embeddings (B, s + N, d) and mask (B, s + N)."""
        mask, soft = batch.instruction_mask, self._soft_columns(prompt, batch)
        padding = (~mask).sum(1, keepdim=True)
        slots = padding + torch.arange(soft.shape[1], device=mask.device)
        columns = torch.arange(mask.shape[1], device=mask.device) + soft.shape[1] * mask
        plan = self._begin(Plan(mask, slots=slots, columns=columns, soft=slots))
        words = self._embed(batch.instruction_ids, mask)
        for edit in self.edits:
            words = edit.embed(plan, words)
        wide = [c[..., None].expand(-1, -1, words.shape[-1]) for c in (columns, slots)]
        both = torch.cat([words, soft], 1)
        embeds = both.scatter(1, torch.cat(wide, 1), both)
        if "encoding" in self._reads:
            _, plan.encoding = self._read(batch, None)
        return plan, embeds, torch.cat([mask, torch.ones_like(slots, dtype=torch.bool)], 1)

    def _plan_after(self, prompt: SoftPrompt, batch: Batch, cache: DynamicCache | None) -> tuple[Plan, Tensor]:
        """Run the bare instruction, filling `cache`; then the soft columns come first in the next pass."""
        (states, encoding), soft = self._read(batch, cache), self._soft_columns(prompt, batch)
        slots = torch.arange(soft.shape[1], device=soft.device).expand(len(soft), -1)
        start = batch.instruction_mask.shape[1] - 1
        plan = Plan(batch.instruction_mask, slots=slots, states=states, encoding=encoding, soft=start + slots)
        return self._begin(plan), soft

    def _begin(self, plan: Plan) -> Plan:
        for edit in self.edits:
            edit.begin(plan)
        return plan

    @torch.no_grad()
    def _read(self, batch: Batch, cache: DynamicCache | None) -> tuple[list[Tensor], Tensor]:
        """The instruction through the bare backbone; what generators will read of it.

        Args:
            batch: its instructions run.
            cache: the frozen prefix, which is filled, with every layer's input states in the answer if they are read;
                None where these will be those of the pass to come.

        Returns:
            (B, N, d) for every layer, or none, and the last hidden states (B, N, d).
        """
        record: list[Tensor] = []
        plan = Plan(batch.instruction_mask, record=record) if "layers" in self._reads else None
        embeds = self._embed(batch.instruction_ids, batch.instruction_mask)
        return record, self._run(embeds, batch.instruction_mask, cache, plan=plan, keep_cache=True)

    def _run(
        self,
        embeds: Tensor,
        mask: Tensor,
        cache: DynamicCache | None = None,
        *,
        keep: int = 0,
        plan: Plan | None = None,
        keep_cache: bool = False,
    ) -> Tensor:
        """One pass: embeds (B, Q, d) are the last Q of mask's (B, C + Q) columns, the cache holds the others.

        The cache is extended with `keep_cache` and else left as it is.

        Returns:
            The logits (B, keep, V) of the last `keep` columns, or the last hidden states (B, Q, d) if keep is 0.

        Raises:
            UserError: if a layer's keys and values were to be edited and never came by.
        """
        if keep_cache and self.hooks.recompute and torch.is_grad_enabled():
            raise ValueError("layers that are recomputed in the backward pass would write into the cache twice")
        edit = self.hooks.on_cache(plan) if plan is not None else None
        view: DynamicCache | None = cache
        if edit is not None or (cache is not None and not keep_cache):
            view = PassCache(cache, edit, keep_cache)
        names = self.arguments
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask.long(), names.cache: view}
        if names.positions:
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        if names.use_cache:
            inputs["use_cache"] = view is not None
        if plan is not None:
            plan.cache = cache
        self.hooks.plan = plan
        try:
            if keep and names.logits_to_keep:
                found: Tensor = self.lm(**inputs, logits_to_keep=keep).logits
            elif keep:
                found = self.lm(**inputs).logits[:, -keep:]
            else:
                found = self.backbone.decoder(**inputs)[0]
        finally:
            self.hooks.plan = None
        if edit is not None:
            assert isinstance(view, PassCache)
            assert plan is not None
            if unasked := set(range(self.backbone.num_layers)) - plan.hidden - view.asked:
                raise UserError(
                    f"method: {type(self.method).__name__} edits every layer's keys and values, and in "
                    f"{type(self.lm).__name__} those of layers {sorted(unasked)} never came by the cache"
                )
        return found

    def _new_cache(self) -> DynamicCache:
        """An empty cache for one pass and what continues it.

        Where every layer is attention the cache keeps all columns of all of them, so that the last one can be taken
        off again; windows are the mask's business. Recurrent and other layers get what their config asks for.
        """
        return DynamicCache() if self._rewindable else DynamicCache(config=self.lm.config)

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, N, e) embeddings of ids (B, N); a pad token need not be in the table."""
        return self.backbone.embed(ids.masked_fill(~mask, 0))

    def precision(self) -> AbstractContextManager[Any]:
        """A context in which the backbone computes as in this engine's passes."""
        return torch.autocast(self.lm.device.type, self.autocast) if self.autocast else nullcontext()
