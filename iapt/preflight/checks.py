"""The checks of a preflight, and what each says when it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from iapt.config.errors import UserError
from iapt.data.batch import Batch
from iapt.model.adapted import AdaptedModel, cross_entropy
from iapt.model.decoding import end_tokens
from iapt.preflight.known import known_there
from iapt.preflight.tools import FLOOR, LENGTHS, SPARE, distance, move, rounding_errors, rows, unreached

# What two right roads may differ by at least, by what is computed in: with another number of columns a kernel cuts its
# sums elsewhere. A wrong position or mask, or a lost edit, mostly makes a difference of 0.1 and more.
TOLERANCES = {
    "float64": 1e-3,  # as float32, since rotations and norms are computed in float32 all the same
    "float32": 1e-3,  # seen up to 1e-4, where soft tokens take the place of a sink of attention
    "float16": 2e-2,  # 11 bits, and logits of 20 that spread by 2 are rounded to a hundredth of the spread
    "bfloat16": 5e-2,  # 8 bits: the same logits are rounded to a thirtieth and more
    "quantised": 3e-1,  # LLM.int8 rounds activations by what else is in the batch; nf4 computes in bfloat16
}
# Models differ in what they make of rounding, by a factor of 30 and more. So it is measured on the model at hand: what
# errors of one rounding in front of every layer do to the logits. Differences between right roads were seen to be up to
# 2.1 times that, on real models in float32 and bfloat16.
ROUNDINGS = 4
COARSE = 0.5  # a tolerance above it is worth a word: some mistakes would not show
STEPS = 3  # tokens decoded
TRIES = 4  # of a gradient: a ReLU may be dead at one draw of noise
SHOWN = 0.1  # how far the noise shall move the logits, in units of their spread, so that a lost edit is seen

WHAT = {
    "causality": "the logits ahead of a changed token and those of the text as it was",
    "prefix": "an instruction that is encoded and continued and one pass without a cache",
    "training": "the training pass and one pass without a cache",
    "padding_left": "a batch with more padding on the left and the same batch without it",
    "padding_right": "a batch with more padding on the right and the same batch without it",
    "moved": "the logits of a changed adapter and those of the adapter as it is",
    "off": "the model with its method switched off and transformers' own forward pass",
    "decoding": f"{STEPS} tokens decoded with the cache and {STEPS} without",
}


class Probe:
    """The checks, one after the other; see `check`."""

    def __init__(self, model: AdaptedModel, name: str, switch: str, starts: dict[str, Tensor]) -> None:
        self.model, self.engine, self.lm = model, model.engine, model.lm
        self.name, self.switch, self.starts = name, switch, starts
        quantised = getattr(model.lm, "is_quantized", False)
        computed = self.engine.autocast or model.lm.dtype
        self.precision = "quantised" if quantised else str(computed).removeprefix("torch.")
        self.tolerance = TOLERANCES.get(self.precision, TOLERANCES["quantised"])
        self.figures: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self.reached = 0
        self.unrouted: frozenset[str] = frozenset()
        self.doing = WHAT["off"]
        self.batch = rows(model)
        self.trained = {n: p for n, p in model.trainable().items() if p.requires_grad}

    def run(self, gradients: bool) -> None:
        """All of them."""
        try:
            with torch.no_grad():
                self._all(gradients)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a library makes of a model or method that it was not made for
            first = next(iter(str(error).strip().splitlines()), "")
            raise self._error(f"{self.doing}: ended in {type(error).__name__}: {first[:200]}") from error

    def _all(self, gradients: bool) -> None:
        self.model.train(False)
        self.doing = "one pass without a cache"
        own = self._own()
        wanted = self._move(self._whole(self.batch))
        self._measure_rounding(wanted)
        self._causality(wanted)
        self._prefix(wanted)
        self._padding(wanted)
        self._off(own)
        self._decoding()
        if gradients:
            self._gradients()
        elif self.trained:
            self.skipped["gradients"] = "nothing is trained here"

    # -- the checks ---------------------------------------------------------------------------------------

    def _move(self, untouched: Tensor) -> Tensor:
        """Move the trained tensors until the logits show it; returns the logits then."""
        self.doing = WHAT["moved"]
        if not self.trained:
            self.skipped["moved"] = self.skipped["gradients"] = "the method trains nothing"
            return untouched
        size = 1.0
        for _ in range(6):
            move(self.trained, self.starts, size, seed=0)
            found = self._whole(self.batch)
            far = distance(found, untouched, self.batch.response_mask)
            if far >= SHOWN or far != far:
                break
            size *= 3
        self.figures["moved"] = far
        if far == 0:
            raise self._error(f"{self.doing} do not differ: its {len(self.trained)} trained tensors reach nothing")
        if far != far:
            raise self._error(f"{self.doing} are not finite")
        return found

    def _measure_rounding(self, wanted: Tensor) -> None:
        """Raise the tolerance where this model makes much of rounding errors."""
        self.doing = "one pass without a cache"
        size = torch.finfo(self.engine.autocast or self.lm.dtype).eps / 4
        with rounding_errors(self.model.backbone.layers, size):
            far = [distance(self._whole(self.batch), wanted, self.batch.response_mask) for _ in range(2)]
        self.figures["rounding"] = max(far)
        self.tolerance = max(self.tolerance, ROUNDINGS * max(far))
        if self.tolerance > COARSE:
            self.skipped["small differences"] = (
                f"rounding alone moves this model's logits by {max(far):.2g} of their spread"
            )

    def _causality(self, wanted: Tensor) -> None:
        changed = self._with(response_ids=self.batch.response_ids.clone())
        # The last column but one: the last is not run, it predicts nothing.
        changed.response_ids[:, -2] = self.batch.response_ids[:, -2].roll(1)
        # Two passes of one shape, which round alike: a look ahead is seen even where flat weights make it faint.
        allowed = self.tolerance if self.precision == "quantised" else ROUNDINGS * self.figures["rounding"]
        self._compare("causality", lambda: self._whole(changed)[:, :-1], wanted[:, :-1], allowed=allowed)

    def _prefix(self, wanted: Tensor) -> None:
        def trained() -> Tensor:
            self.engine.train(True)  # and no module of the method: dropout would be a difference
            try:
                with torch.enable_grad():
                    return self.engine.response_logits(self.batch).detach()
            finally:
                self.engine.train(False)

        self._compare("training", trained, wanted)
        if self.engine.one_pass:
            self.skipped["prefix"] = "the backbone's state cannot be continued twice, so every text is run whole"
            return

        def continued() -> Tensor:
            prefix, mask = self.model.prefill(self.batch), self.batch.response_mask
            # Another response first: it must leave the prefix as it was.
            self.engine.extend(prefix, self.batch.response_ids.flip(0), mask)
            return self.engine.extend(prefix, self.batch.response_ids, mask)

        self._compare("prefix", continued, wanted)

    def _padding(self, wanted: Tensor) -> None:
        b, pad = self.batch, self.model.backbone.pad_id
        left = self._with(
            instruction_ids=nn.functional.pad(b.instruction_ids, (SPARE, 0), value=pad),
            instruction_mask=nn.functional.pad(b.instruction_mask, (SPARE, 0)),
        )
        right = self._with(
            response_ids=nn.functional.pad(b.response_ids, (0, SPARE), value=pad),
            response_mask=nn.functional.pad(b.response_mask, (0, SPARE)),
        )
        self._compare("padding_left", lambda: self._whole(left), wanted)
        self._compare("padding_right", lambda: self._whole(right)[:, :-SPARE], wanted)

    def _gradients(self) -> None:
        self.doing = "the gradients of the trained tensors"
        if not self.trained:
            return
        if torch.is_inference_mode_enabled():
            self.skipped["gradients"] = "inside torch.inference_mode there are none"
            return
        assert self.model.method is not None
        idle = self.model.method.idle()
        if idle:
            self.skipped["idle tensors"] = f"{len(idle)} that nothing depends on with these settings"
        left = {n: p for n, p in self.trained.items() if n not in idle}
        for attempt in range(TRIES):
            if attempt:  # the first is as far off as the logits needed to show it, the others are near the start
                move(self.trained, self.starts, 1.0, seed=attempt)
            self.model.train(True)
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.train(False)
            left = self._routed(self._without_gradient(left))
            if not left:
                break
        self.model.train(False)
        self.reached = len(self.trained) - len(idle) - len(self.unrouted)
        if left:
            names = ", ".join(sorted(left)[:3]) + (" ..." if len(left) > 3 else "")
            raise self._error(f"{len(left)} of {len(self.trained)} trained tensors get no gradient ({names})")

    def _without_gradient(self, asked: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those whose gradient is missing or zero, of the cross-entropy, and of the method's own objective if it has
        one that the probe can ask for."""
        assert self.model.method is not None
        method = self.model.method
        with torch.enable_grad():
            logits = self.engine.response_logits(self.batch)
            left = unreached(cross_entropy(logits, self.batch), asked)
            if not method.has_objective or not left:
                if method.has_objective:
                    self.skipped["objective"] = "gradients are those of the response tokens' cross-entropy"
                return left
            labels = torch.arange(len(self.batch), device=logits.device) % 2
            try:
                return unreached(self.model.loss(self._with(labels=labels), "sum"), left)
            except ValueError:  # it wants more of a batch
                return left

    def _routed(self, left: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """`left` without the tensors of experts that no token came to, as long as one expert beside them was asked."""

        def place(name: str) -> str | None:
            head, found, _ = f".{name}".partition(".experts.")
            return head if found else None

        reached = {place(name) for name in self.trained if name not in left}
        unrouted = frozenset(name for name in left if place(name) is not None and place(name) in reached)
        self.unrouted = unrouted
        if unrouted:
            self.skipped["experts"] = f"{len(unrouted)} tensors of experts that no token of the probe came to"
        return {name: p for name, p in left.items() if name not in unrouted}

    def _own(self) -> Tensor:
        """(B, R, V): transformers' own forward pass, the method switched off, before any of its tensors is moved.

        A method that cannot be switched off would otherwise stand on both sides.
        """
        self.doing = WHAT["off"]
        found = []
        with self.model.disabled(), self.engine.precision():
            for i, (instruction, response) in enumerate(LENGTHS):
                shown, said = self.batch.instruction_ids[i], self.batch.response_ids[i]
                text = torch.cat([shown[-instruction:], said[: response - 1]])
                logits = self.lm(input_ids=text[None]).logits[0, -response:]
                found.append(nn.functional.pad(logits, (0, 0, 0, self.batch.response_ids.shape[1] - response)))
        return torch.stack(found)

    def _off(self, own: Tensor) -> None:
        def switched_off() -> Tensor:
            with self.model.disabled():
                return self.engine.response_logits(self.batch)

        self._compare("off", switched_off, own)

    def _decoding(self) -> None:
        self.doing = WHAT["decoding"]
        steps: list[Tensor] = []
        hook = self.lm.register_forward_hook(lambda module, args, output: steps.append(output.logits[:, -1].clone()))
        try:
            tokens = self.model.generate(self.batch, max_new_tokens=STEPS, min_new_tokens=STEPS)
        finally:
            hook.remove()
        if tokens.shape != (len(self.batch), STEPS) or len(steps) != STEPS:
            raise self._error(f"{self.doing} gave tokens of shape {tuple(tokens.shape)} in {len(steps)} passes")
        mask = torch.ones_like(tokens, dtype=torch.bool)
        whole = self._with(response_ids=tokens, response_mask=mask)
        wanted = self._whole(whole)
        self._compare("decoding", lambda: torch.stack(steps, 1), wanted, mask)
        # And the likeliest was taken; of two that are equal within the tolerance, either.
        wanted = wanted.float()
        best = wanted.index_fill(-1, self._ends(), -torch.inf).amax(-1)
        short = best - wanted.gather(-1, tokens[..., None])[..., 0]
        far = float((short / wanted.clamp(min=FLOOR).std(-1)).max())
        if not far <= self.tolerance * 10:  # the gap between two logits, in which their errors add up
            raise self._error(f"{self.doing}: a token was chosen whose logit is {far:.3g} of the spread below the best")

    # -- what they share ----------------------------------------------------------------------------------

    def _whole(self, batch: Batch) -> Tensor:
        """(B, R, V): the reference, on the one road that never uses a cache."""
        was, self.engine.one_pass = self.engine.one_pass, True
        try:
            return self.engine.response_logits(batch)
        finally:
            self.engine.one_pass = was

    def _compare(
        self,
        check: str,
        found: Callable[[], Tensor],
        wanted: Tensor,
        mask: Tensor | None = None,
        allowed: float | None = None,
    ) -> None:
        self.doing = WHAT[check]
        mask = self.batch.response_mask if mask is None else mask
        far = distance(found(), wanted, mask[:, : wanted.shape[1]])
        self.figures[check] = far
        allowed = self.tolerance if allowed is None else allowed
        if not far <= allowed:
            raise self._error(
                f"{self.doing} differ by {far:.3g} of the logits' spread (allowed {allowed:.0e} in {self.precision})"
            )

    def _with(self, **changes: Any) -> Batch:
        return Batch(**{**vars(self.batch), **changes})

    def _ends(self) -> Tensor:
        """The ids that end a text, which the probe forbids."""
        rows = self.model.backbone.embeddings.weight.shape[0]
        known = [i for i in end_tokens(self.lm, self.model.backbone.tokenizer) if 0 <= i < rows]
        return torch.tensor(known, dtype=torch.long, device=self.lm.device)

    def _error(self, what: str) -> UserError:
        kind = str(self.lm.config.model_type)
        return UserError(
            f"preflight: {what}: method {self.name} on model_type {kind} (transformers {transformers.__version__}); "
            f"{known_there(kind, self.name)}; {self.switch} runs it without this check"
        )
