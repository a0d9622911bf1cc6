"""A probe of the very model that is about to run: method, backbone, dtype and attention as they are.

Two short rows of different length go through the roads that a run takes, and each road is held against a second one
that must lead to the same logits, or to different ones:

    causality       a token changes no logits ahead of it
    prefix          an instruction that is encoded and continued equals one pass without any cache; so does the
                    training pass
    padding_left, padding_right   superfluous padding changes nothing
    moved           the logits depend on the method's tensors, and each of these gets a gradient
    off             the method switched off equals transformers' own forward pass over the ids of an unpadded row
    decoding        three tokens decoded with the cache equal the same three without

Methods start where they change nothing or little (LoRA's B, a closed gate), and there most mistakes are invisible. So
the trained tensors are moved first, by noise, until the logits show it, and put back afterwards bit for bit, like
random numbers, modes and gradients.

A difference is measured at each position: the standard deviation over the vocabulary of the difference between two
rows of logits (a constant added to all of them means nothing), divided by that of the logits themselves. The largest
over all positions counts.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from iapt.batch import Batch, Encoded, collate
from iapt.config import Config
from iapt.errors import UserError
from iapt.methods import Method, SoftPrompt
from iapt.model import AdaptedModel, cross_entropy

# What two right roads may differ by, by what is computed in. Orders of summation differ between the roads: with
# another number of columns a kernel cuts its sums elsewhere. Measured on right models it is far below; a wrong
# position, mask or lost edit is far above.
TOLERANCES = {
    "float64": 1e-3,  # as float32, since rotations and norms are computed in float32 all the same
    "float32": 1e-3,  # seen up to 1e-4, where initial values are large and many layers deep
    "float16": 3e-2,  # 11 bits, and logits of 20 that spread by 2 are rounded to a hundredth of the spread
    "bfloat16": 2e-1,  # 8 bits: the same logits are rounded to a sixteenth
    "quantised": 3e-1,  # LLM.int8 rounds activations by what else is in the batch; nf4 computes in bfloat16
}
LENGTHS = ((6, 4), (2, 3))  # tokens of instruction and response of each row; two are the fewest that a run allows
STEPS = 3  # tokens decoded
TRIES = 4  # of a gradient: a ReLU may be dead at one draw of noise
SHOWN = 0.1  # how far the noise shall move the logits, in units of their spread, so that a lost edit is seen
FLOOR = -1e4  # logits below it are not predictions but masks, as of the tokens that stand for pictures
VERIFIED = Path(__file__).with_name("verified.json")


def run(config: Config, model: AdaptedModel, *, gradients: bool) -> dict[str, Any]:
    """`check`, unless the configuration says off. Every process runs it: sharded layers need all of them."""
    if config.preflight == "off":
        return {"status": "off"}
    return check(model, config.method.name, gradients=gradients)


def check(model: AdaptedModel, name: str, *, gradients: bool = True, switch: str = "preflight=off") -> dict[str, Any]:
    """Probe a model on its device. Parameters, gradients, modes and random numbers stay as they were.

    Args:
        model: in any mode.
        name: of its method, for messages.
        gradients: whether it may be trained; else its tensors only have to reach the logits.
        switch: how the caller turns this off, for messages.

    Returns:
        What `summary.json` shows: `status` (passed, or skipped as a whole), `tolerance` and `precision` it belongs to,
        the largest difference of each check in units of the logits' spread, `tensors_with_gradient`, `skipped`
        (what was not checked -> why) and `seconds`.

    Raises:
        UserError: in one line, what differs by how much, or what a library raised.
        torch.OutOfMemoryError: as anywhere else.
    """
    start = time.perf_counter()
    if reason := _no_room(model):
        return {"status": "skipped", "skipped": {"all": reason}, "seconds": 0.0}
    with _undisturbed(model):
        probe = _Probe(model, name, switch)
        probe.run(gradients)
    return {
        "status": "passed",
        "precision": probe.precision,
        "tolerance": probe.tolerance,
        **{what: float(f"{value:.3g}") for what, value in probe.figures.items()},
        "tensors_with_gradient": probe.reached,
        "skipped": probe.skipped,
        "seconds": round(time.perf_counter() - start, 3),
    }


def line(figures: dict[str, Any]) -> str:
    """What `check` found, for people."""
    if figures["status"] != "passed":
        return f"preflight: {figures['status']} {figures.get('skipped', {}).get('all', '')}".rstrip()
    compared = [v for k, v in figures.items() if k in _WHAT and k != "moved"]
    skipped = f", skipped {', '.join(figures['skipped'])}" if figures["skipped"] else ""
    return (
        f"preflight: passed in {figures['seconds']:.1f}s, largest difference {max(compared):.1e} of the logits' spread "
        f"(allowed {figures['tolerance']:.0e} in {figures['precision']}){skipped}"
    )


_WHAT = {
    "causality": "the logits ahead of a changed token, compared with those of the same text as it was,",
    "prefix": "an instruction encoded and continued, compared with one pass without a cache,",
    "training": "the training pass, compared with one pass without a cache,",
    "padding_left": "a batch with more padding on the left, compared with the same batch without it,",
    "padding_right": "a batch with more padding on the right, compared with the same batch without it,",
    "moved": "the logits of a changed adapter, compared with those of the adapter as it is,",
    "off": "the model with its method switched off, compared with transformers' own forward pass,",
    "decoding": f"{STEPS} tokens decoded with the cache, compared with {STEPS} without,",
}


class _Probe:
    """The checks, one after the other; see `check`."""

    def __init__(self, model: AdaptedModel, name: str, switch: str) -> None:
        self.model, self.engine, self.lm = model, model.engine, model.lm
        self.name, self.switch = name, switch
        quantised = getattr(model.lm, "is_quantized", False)
        computed = self.engine.autocast or model.lm.dtype
        self.precision = "quantised" if quantised else str(computed).removeprefix("torch.")
        self.tolerance = TOLERANCES.get(self.precision, TOLERANCES["quantised"])
        self.figures: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self.reached = 0
        self.doing = _WHAT["off"]
        self.batch = _rows(model)
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
            raise self._error(f"{self.doing} ended in {type(error).__name__}: {first[:200]}") from error

    def _all(self, gradients: bool) -> None:
        self.model.train(False)
        self.doing = "one pass without a cache"
        untouched = self._whole(self.batch)
        wanted = self._move(untouched)
        self._causality(wanted)
        self._prefix(wanted)
        self._padding(wanted)
        if gradients:
            self._gradients(wanted)
        elif self.trained:
            self.skipped["gradients"] = "nothing is trained here"
        self._off()
        self._decoding()

    # -- the checks ---------------------------------------------------------------------------------------

    def _move(self, untouched: Tensor) -> Tensor:
        """Move the trained tensors until the logits show it; returns the logits then."""
        self.doing = _WHAT["moved"]
        if not self.trained:
            self.skipped["moved"] = self.skipped["gradients"] = "the method trains nothing"
            return untouched
        size = 1.0
        for _ in range(5):
            _add_noise(self.trained.values(), size, seed=0)
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

    def _causality(self, wanted: Tensor) -> None:
        changed = self._with(response_ids=self.batch.response_ids.clone())
        # The last column but one: the last is not run, it predicts nothing.
        changed.response_ids[:, -2] = self.batch.response_ids[:, -2].roll(1)
        self._compare("causality", lambda: self._whole(changed)[:, :-1], wanted[:, :-1])

    def _prefix(self, wanted: Tensor) -> None:
        self._compare("training", lambda: self.engine.response_logits(self.batch), wanted)
        if self.engine.one_pass:
            self.skipped["prefix"] = "the backbone's state cannot be continued twice, so every text is run whole"
            return

        def continued() -> Tensor:
            prefix, mask = self.model.encode(self.batch), self.batch.response_mask
            # Another response first: it must leave the prefix as it was.
            self.engine.continue_prefix(prefix, self.batch.response_ids.flip(0), mask)
            return self.engine.continue_prefix(prefix, self.batch.response_ids, mask)

        self._compare("prefix", continued, wanted)

    def _padding(self, wanted: Tensor) -> None:
        b, pad = self.batch, self.model.backbone.pad_id
        left = self._with(
            instruction_ids=nn.functional.pad(b.instruction_ids, (3, 0), value=pad),
            instruction_mask=nn.functional.pad(b.instruction_mask, (3, 0)),
        )
        right = self._with(
            response_ids=nn.functional.pad(b.response_ids, (0, 2), value=pad),
            response_mask=nn.functional.pad(b.response_mask, (0, 2)),
        )
        self._compare("padding_left", lambda: self._whole(left), wanted)
        self._compare("padding_right", lambda: self._whole(right)[:, :-2], wanted)

    def _gradients(self, wanted: Tensor) -> None:
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
            if attempt:
                _add_noise(self.trained.values(), 1.0, seed=attempt)
            self.model.train(True)
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.train(False)
            left = self._without_gradient(left, wanted if attempt == 0 else None)
            left = self._routed(left)
            if not left:
                break
        self.model.train(False)
        self.reached = len(self.trained) - len(idle) - len(self._unrouted)
        if left:
            names = ", ".join(sorted(left)[:3]) + (" ..." if len(left) > 3 else "")
            raise self._error(f"{len(left)} of {len(self.trained)} trained tensors get no gradient ({names})")

    def _without_gradient(self, asked: dict[str, nn.Parameter], wanted: Tensor | None) -> dict[str, nn.Parameter]:
        """Those whose gradient is missing or zero, of the cross-entropy, and of the method's own objective if it has
        one that the probe can ask for."""
        self.doing = "the gradient"
        method = self.model.method
        assert method is not None
        with torch.enable_grad():
            logits = self.engine.response_logits(self.batch)
            left = _unreached(cross_entropy(logits, self.batch), asked)
            if type(method).objective is Method.objective or not left:
                if type(method).objective is not Method.objective:
                    self.skipped["objective"] = "gradients are those of the response tokens' cross-entropy"
                return left
            labels = torch.arange(len(self.batch), device=logits.device) % 2
            return _unreached(self.model.loss(self._with(labels=labels), "sum"), left)

    _unrouted: frozenset[str] = frozenset()

    def _routed(self, left: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """`left` without the tensors of experts that no token came to, as long as one expert beside them was asked."""

        def place(name: str) -> str | None:
            head, found, _ = f".{name}".partition(".experts.")
            return head if found else None

        reached = {place(name) for name in self.trained if name not in left}
        unrouted = frozenset(name for name in left if place(name) is not None and place(name) in reached)
        self._unrouted = unrouted
        if unrouted:
            self.skipped["experts"] = f"{len(unrouted)} tensors of experts that no token of the probe came to"
        return {name: p for name, p in left.items() if name not in unrouted}

    def _off(self) -> None:
        def switched_off() -> Tensor:
            with self.model.disabled():
                return self.engine.response_logits(self.batch)

        def own() -> Tensor:
            found = []
            with self.model.disabled(), self._precision():
                for i, (instruction, response) in enumerate(LENGTHS):
                    shown, said = self.batch.instruction_ids[i], self.batch.response_ids[i]
                    text = torch.cat([shown[-instruction:], said[: response - 1]])
                    logits = self.lm(input_ids=text[None]).logits[0, -response:]
                    found.append(nn.functional.pad(logits, (0, 0, 0, self.batch.response_ids.shape[1] - response)))
            return torch.stack(found)

        self.doing = _WHAT["off"]
        self._compare("off", switched_off, own())

    def _decoding(self) -> None:
        self.doing = _WHAT["decoding"]
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

    def _compare(self, check: str, found: Any, wanted: Tensor, mask: Tensor | None = None) -> None:
        self.doing = _WHAT[check]
        mask = self.batch.response_mask if mask is None else mask
        far = distance(found(), wanted, mask[:, : wanted.shape[1]])
        self.figures[check] = far
        if not far <= self.tolerance:
            raise self._error(
                f"{self.doing} differs by {far:.3g} of the logits' spread "
                f"(allowed {self.tolerance:.0e} in {self.precision})"
            )

    def _with(self, **changes: Any) -> Batch:
        return Batch(**{**vars(self.batch), **changes})

    def _precision(self) -> AbstractContextManager[Any]:
        autocast = self.engine.autocast
        return torch.autocast(self.lm.device.type, autocast) if autocast else nullcontext()

    def _ends(self) -> Tensor:
        """Every id that might end a text: the probe forbids them, whichever of them decoding goes by."""
        found: set[int] = set()
        for source in (self.model.backbone.tokenizer, self.lm.config, self.lm.generation_config):
            ids = getattr(source, "eos_token_id", None)
            found |= set(ids) if isinstance(ids, list | tuple) else set() if ids is None else {int(ids)}
        known = [i for i in sorted(found) if 0 <= i < self.model.backbone.embeddings.weight.shape[0]]
        return torch.tensor(known, dtype=torch.long, device=self.lm.device)

    def _error(self, what: str) -> UserError:
        kind = str(self.lm.config.model_type)
        return UserError(
            f"preflight: {what}: method {self.name} on model_type {kind} (transformers {transformers.__version__}); "
            f"{known_there(kind, self.name)}; {self.switch} runs it without this check"
        )


def distance(found: Tensor, wanted: Tensor, mask: Tensor) -> float:
    """How far two (B, R, V) logits are apart, see the module; mask (B, R) bool says at which positions.

    NaN if one of them is not finite, except where both are masks.
    """
    a, b = found[mask].double(), wanted[mask].double()
    seen = ~((a < FLOOR) & (b < FLOOR))
    spread, apart = _spread(b, seen), _spread(a - b, seen)
    return float((apart / spread.clamp(min=torch.finfo(torch.float32).tiny)).max())


def _spread(values: Tensor, seen: Tensor) -> Tensor:
    """Standard deviations (n,) over the last dimension of what is seen (n, V)."""
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    centred = values.where(seen, 0)
    centred = (centred - centred.sum(-1, keepdim=True) / count).where(seen, 0)
    return (centred.square().sum(-1, keepdim=True) / count).sqrt()[:, 0]


def known_there(model_type: str, method: str) -> str:
    """What the shipped table of tested methods says about an architecture."""
    table = json.loads(VERIFIED.read_text(encoding="utf-8")) if VERIFIED.is_file() else {}
    family = table.get("families", {}).get(model_type)
    if not family or not family.get("right"):
        return "no method was tested there"
    refused = family.get("refused", {}).get(method)
    why = f"it is known not to work there ({refused}); " if refused else ""
    return f"{why}known to be right there: {', '.join(family['right'])}"


def _no_room(model: AdaptedModel) -> str | None:
    """Why the probe does not fit into the backbone's context, None if it does."""
    soft = model.method.num_soft_tokens if isinstance(model.method, SoftPrompt) else 0
    needed = soft + max(map(sum, LENGTHS)) + 3
    context = model.backbone.context
    if context is not None and needed > context:
        return f"(the probe takes {needed} positions, the context has {context})"
    return None


def _rows(model: AdaptedModel) -> Batch:
    """Two rows of ordinary tokens, drawn by a generator of their own, on the model's device."""
    backbone, tokenizer = model.backbone, model.backbone.tokenizer
    size, special = backbone.embeddings.weight.shape[0], {backbone.pad_id}
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        special |= {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        size = min(size, len(tokenizer))
    for config in (model.lm.config, model.lm.config.get_text_config()):
        # Pictures and sounds stand behind ids of their own.
        for key, value in config.to_dict().items():
            if key.endswith(("_token_id", "_token_index")):
                special |= set(value if isinstance(value, list | tuple) else [value])
    ordinary = [i for i in range(size) if i not in special] or list(range(size))
    generator = torch.Generator().manual_seed(0)
    wanted = [i for m in model.modules() for i in _own_tokens(m)]  # tensors that hang on single tokens
    rows = []
    for index, lengths in enumerate(LENGTHS):
        drawn = [ordinary[int(i)] for i in torch.randint(len(ordinary), (sum(lengths),), generator=generator)]
        if index == 0:
            drawn[1 : 1 + len(wanted[:4])] = wanted[:4]
        rows.append(Encoded(index, tuple(drawn[: lengths[0]]), tuple(drawn[lengths[0] :]), ()))
    return collate(rows, backbone.pad_id).to(model.lm.device)


def _own_tokens(module: nn.Module) -> list[int]:
    """The ids for which peft's layer at an embedding table has rows of its own."""
    ids = getattr(module, "token_indices", None)
    return [int(i) for one in ids.values() for i in one] if isinstance(ids, dict) else []


def _add_noise(parameters: Any, size: float, seed: int) -> None:
    """To each a tenth of its own size times `size`; what is zero gets small numbers."""
    for index, parameter in enumerate(parameters):
        generator = torch.Generator(parameter.device).manual_seed(1000 * seed + index)
        scale = float(parameter.float().square().mean().sqrt())
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        parameter.add_((noise * size * (0.1 * scale or 0.02)).to(parameter.dtype))


def _unreached(loss: Tensor, asked: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those without a gradient other than zero."""
    if not asked or not loss.requires_grad:
        return asked
    # Not by backward(): what stands in .grad is the caller's.
    found = torch.autograd.grad(loss, list(asked.values()), allow_unused=True)
    return {
        name: parameter
        for (name, parameter), gradient in zip(asked.items(), found, strict=True)
        if gradient is None or not gradient.any()
    }


@contextmanager
def _undisturbed(model: AdaptedModel) -> Iterator[None]:
    """A context at whose end the model and all random numbers are as they were."""
    engine, lm = model.engine, model.lm
    was = engine.training, engine.hooks.recompute, engine.one_pass
    modes = [(module, module.training) for module in model.modules()]
    kept = {name: p.detach().to("cpu", copy=True) for name, p in model.trainable().items()}
    generation, lm.generation_config = lm.generation_config, GenerationConfig()
    states = random.getstate(), np.random.get_state()
    devices = {p.device for p in lm.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        lm.generation_config = generation
        with torch.no_grad():
            for name, parameter in model.trainable().items():
                parameter.copy_(kept[name])
        for module, mode in modes:
            module.training = mode
        engine.training, engine.hooks.recompute, engine.one_pass = was
