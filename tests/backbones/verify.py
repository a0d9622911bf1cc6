"""One cell of the table of backbones: what the preflight says of a method variant on a backbone, and the reference.

A variant counts as refused where attaching it or the preflight refuses it, as a user would see; what both let pass is
held against the reference.
"""

from __future__ import annotations

import traceback
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from iapt import preflight
from iapt.config.errors import UserError
from iapt.data.batch import Encoded, collate
from iapt.methods.labels import label_loss
from iapt.model.adapted import AdaptedModel
from tests.backbones import zoo
from tests.backbones.reference import NoRoadError, Reference
from tests.backbones.variants import VARIANTS, attach
from tests.contracts.conftest import batch

# float32 on the CPU: two roads through three layers differ by some 1e-5; the smallest wrong mask seen, by 1e-2.
TOLERANCE = 1e-3
STEPS = 4


@dataclass(frozen=True)
class Cell:
    """What came of a variant on a backbone: `right`, `refused`, `crashed` or `wrong`, and what there is to say."""

    status: str
    detail: str = ""


class WrongNumberError(Exception):
    """A number that is not the reference's."""


def examples() -> list[Encoded]:
    """Instructions of 2 to 11 tokens, responses of 1 to 4, three choices of 1 and 2."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).tolist())

    return [
        Encoded(i, (1, *draw(1 + (i * 7) % 11)), draw(1 + i % 4), (draw(1), draw(2), draw(1)), label=i % 3)
        for i in range(4)
    ]


def verify(name: str, variant: str) -> Cell:
    """Try a variant on a backbone of the zoo's, and say what came of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            backbone = zoo.build(name)
            model = attach(VARIANTS[variant], backbone)
            preflight.check(model, VARIANTS[variant].method)
            return Cell("right", compare(model, name))
        except UserError as error:
            lines = str(error).splitlines()
            return Cell("refused", lines[0]) if len(lines) == 1 else Cell("crashed", f"{len(lines)} lines: {error}")
        except WrongNumberError as error:
            return Cell("wrong", str(error))
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = " < ".join(f"{f.filename.split('/')[-1]}:{f.lineno} {f.name}" for f in reversed(frames))
            return Cell(
                "crashed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} @ {where}"
            )


def _causal(lm: torch.nn.Module) -> bool:
    ids = torch.tensor([examples()[3].instruction])
    with torch.no_grad():
        whole, part = (
            lm(input_ids=ids, use_cache=False).logits[:, :-3],
            lm(input_ids=ids[:, :-3], use_cache=False).logits,
        )
    return float((whole - part).abs().max()) < TOLERANCE


def compare(model: AdaptedModel, name: str) -> str:
    """Hold score, loss, generation, off-switch and gradients against the reference; say which roads it took.

    Raises:
        WrongNumberError: at the first number that differs.
    """
    if not _causal(zoo.build_lm(name)):
        raise WrongNumberError("the backbone is not causal, and was not refused")
    items = examples()
    reference: Reference | _OnePass = Reference(model)
    try:
        _compare_rows(model, reference, items)
        roads = ", ".join(sorted(reference.roads))
    except NoRoadError as unknown:
        reference = _OnePass(model)
        _compare_rows(model, reference, items)
        roads = f"one pass a row ({unknown})"
    _compare_off(model, name, items)
    _compare_gradients(model, reference, items)
    return roads


class _OnePass:
    """The engine's own other road, a row at a time: no cache, no padding."""

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model

    def logits(self, instruction: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
        engine = self.model.engine
        was, engine.one_pass = engine.one_pass, True
        try:
            made = collate([Encoded(0, instruction, (*response, 3), ())], 0)
            return engine.response_logits(made)[0]
        finally:
            engine.one_pass = was

    def state(self, instruction: tuple[int, ...]) -> Tensor:
        engine = self.model.engine
        was, engine.one_pass = engine.one_pass, True
        try:
            return engine.instruction_states(collate([Encoded(0, instruction, (3,), ())], 0))[0]
        finally:
            engine.one_pass = was


def _likelihood(reference: Reference | _OnePass, item: Encoded, answer: tuple[int, ...]) -> Tensor:
    """The log-likelihood of an answer, a scalar in nats."""
    log_p = reference.logits(item.instruction, answer)[:-1].log_softmax(-1)
    return log_p.gather(1, torch.tensor(answer)[:, None]).sum()


def _close(what: str, found: Tensor, expected: Tensor) -> None:
    if not bool(torch.isfinite(found).all()):
        raise WrongNumberError(f"{what}: not finite")
    apart = float(((found - expected).abs() / (1 + 0.1 * expected.abs())).max())
    if apart > TOLERANCE:
        raise WrongNumberError(f"{what}: off by {float((found - expected).abs().max()):.4f}")


@torch.no_grad()
def _compare_rows(model: AdaptedModel, reference: Reference | _OnePass, items: list[Encoded]) -> None:
    if hasattr(model.method, "head"):  # a classification head reads the last state
        heads = torch.stack([model.method.head(reference.state(item.instruction)) for item in items]).log_softmax(-1)
        expected, loss = heads, None
    else:
        expected = torch.stack(
            [torch.stack([_likelihood(reference, i, choice) for choice in i.choices]) for i in items]
        )
        loss = -torch.stack([_likelihood(reference, item, item.response) for item in items]).sum()
    plain, wide = collate(items, 0), batch(items, extra_left=5, extra_right=2)
    alone = torch.cat([model.score(collate([item], 0)) for item in items])
    _close("score, row by row", alone, expected)
    _close("score, batch", model.score(plain), expected)
    _close("score, padded", model.score(wide), expected)
    if loss is not None:
        _close("loss, batch", model.loss(plain, "sum"), loss)
        _close("loss, padded", model.loss(wide, "sum"), loss)
    for what, made in (("batch", plain), ("padded", wide)):
        generated = model.generate(made, max_new_tokens=STEPS, min_new_tokens=STEPS)
        _likeliest(f"generate, {what}", reference, items, generated)


def _likeliest(what: str, reference: Reference | _OnePass, items: list[Encoded], generated: Tensor) -> None:
    """Every generated token is the likeliest after those before it."""
    if generated.shape != (len(items), STEPS):
        raise WrongNumberError(f"{what}: shape {tuple(generated.shape)}")
    for row, (item, ids) in enumerate(zip(items, generated.tolist(), strict=True)):
        logits = reference.logits(item.instruction, tuple(ids))[:-1]
        logits[:, 2] = -torch.inf  # eos: min_new_tokens forbids it
        behind = logits.max(-1).values - logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        if float(behind.max()) > TOLERANCE:
            step = int((behind > TOLERANCE).nonzero()[0])
            raise WrongNumberError(
                f"{what}: token {step} of row {row} is {float(behind[step]):.3f} nats behind the likeliest"
            )


def _compare_off(model: AdaptedModel, name: str, items: list[Encoded]) -> None:
    bare = Reference(AdaptedModel(zoo.build(name), None))
    with torch.no_grad(), model.disabled():
        for item in items[:2]:
            expected = bare.logits(item.instruction, item.response)[:-1]
            made = batch([item], extra_left=5)
            _close("switched off", model.engine.response_logits(made)[0], expected)


def _compare_gradients(model: AdaptedModel, reference: Reference | _OnePass, items: list[Encoded]) -> None:
    """Every trained tensor gets the gradient that it has of the reference's loss; that it gets one at all is what the
    preflight has seen to, on rows of its own: with large random weights a softmax may saturate on these."""
    if not (trained := model.trainable()):
        return
    model.train()
    model.loss(batch(items, extra_left=5, extra_right=2), "sum").backward()
    if hasattr(model.method, "head"):
        states = torch.stack([reference.state(item.instruction) for item in items])
        loss = label_loss(model.method.head(states), collate(items, 0))
    else:
        loss = -torch.stack([_likelihood(reference, item, item.response) for item in items]).sum()
    expected = torch.autograd.grad(loss, list(trained.values()))
    for (name, parameter), gradient in zip(trained.items(), expected, strict=True):
        if parameter.grad is None:
            raise WrongNumberError(f"{name} gets no gradient")
        scale = float(gradient.abs().max())
        if float((parameter.grad - gradient).abs().max()) > 4e-3 * scale + 1e-4:
            raise WrongNumberError(
                f"{name}: gradient off by {float((parameter.grad - gradient).abs().max()):.4f} of {scale:.4f}"
            )
    model.train(False)
