"""The contract of an edit, and the plan of the pass that it acts in.

A method offers edits (`SoftPrompt.edits`). The engine, the hooks, a mixture of adapters and the export go through them
and know none by name, so a new kind of edit is a subclass of `Edit` beside the method that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import Cache

from iapt.config.errors import UserError
from iapt.model.architecture import is_rewindable
from iapt.model.backbone import Backbone
from iapt.model.cache import CacheEdit
from iapt.model.edits.rows import Rows


@dataclass
class Plan:
    """What is known of one pass over the decoder, and what the edits keep of it.

    Attributes:
        mask: (B, N) bool, the instruction's.
        slots: (B, s) int64, the columns of this pass that soft tokens are written into; None: none are.
        columns: (B, N) int64, where this pass holds the instruction's states; None if `states` gives them.
        states: the instruction's states, one (B, N, d) a layer.
        encoding: (B, N, d), the bare backbone's last hidden states of the instruction, if an edit reads them.
        record: every layer's input is appended here; nothing is edited then.
        soft: (B, s) int64, where the soft tokens stand among all columns, the cached ones included.
        hidden: the layers in which no other token sees the soft columns.
        cache: what earlier passes have kept, None for nothing.
        kept: edit -> what it keeps for the rest of this pass, and for those that continue it.
        answers: what `once` was told, so that a second pass does the same without asking; None where there is no
            second pass.
    """

    mask: Tensor
    slots: Tensor | None = None
    columns: Tensor | None = None
    states: Sequence[Tensor] = ()
    encoding: Tensor | None = None
    record: list[Tensor] | None = None
    soft: Tensor | None = None
    hidden: frozenset[int] = frozenset()
    cache: Cache | None = None
    kept: dict[Edit, Any] = field(default_factory=dict)
    answers: dict[tuple[Edit, int], Any] | None = None

    def read(self, what: str, layer: int, hidden: Tensor) -> Tensor:
        """(B, N, d): the states of the instruction that an edit reads (`Edit.reads`), ahead of a layer.

        Args:
            what: `layers`, `encoding` or `nothing`; the last gives no columns, (B, 0, d).
            layer: the layer about to run.
            hidden: (B, Q, d), its input.
        """
        if what == "nothing":
            return hidden[:, :0]
        if what == "encoding":
            assert self.encoding is not None
            return self.encoding
        return self.states[layer] if self.columns is None else take(hidden, self.columns)

    def once(self, edit: Edit, layer: int, ask: Callable[[], Any]) -> Any:
        """The answer of `ask`, and the same again where the pass runs a second time."""
        if self.answers is None:
            return ask()
        if (edit, layer) not in self.answers:
            self.answers[edit, layer] = ask()
        return self.answers[edit, layer]

    def repeat(self, copies: int) -> None:
        """Every row `copies` times, for beams and samples; for plans of a continuation."""
        if self.soft is not None:
            self.soft = self.soft.repeat_interleave(copies, 0)
        self.kept = {edit: edit.repeat(kept, copies) for edit, kept in self.kept.items()}

    def following(self, cache: Cache) -> Plan | None:
        """The plan of the passes that continue this one, None if no edit keeps anything for them."""
        kept = {edit: found for edit, state in self.kept.items() if (found := edit.following(state)) is not None}
        if not kept:
            return None
        return Plan(self.mask, soft=self.soft, hidden=self.hidden, cache=cache, kept=kept)


class Site(Protocol):
    """The place where an edit is installed (`iapt.model.hooks.LayerHooks`).

    Attributes:
        layers: the decoder layers, in order.
    """

    layers: Sequence[nn.Module]

    def before(self, module: nn.Module, act: BeforeModule) -> None:
        """Call `act` ahead of `module` in every pass that has a plan."""

    def after(self, module: nn.Module, act: AfterModule) -> None:
        """Call `act` behind `module` in every pass that has a plan."""


# (plan, module, arguments, keyword arguments) -> both, or None to leave them as they are.
BeforeModule = Callable[
    [Plan, nn.Module, tuple[Any, ...], dict[str, Any]], "tuple[tuple[Any, ...], dict[str, Any]] | None"
]
# (plan, output) -> the output, or None to leave it as it is.
AfterModule = Callable[[Plan, Any], Any]


class Edit:
    """One thing that a method does to the passes over a backbone. A subclass says what; these defaults do nothing.

    An edit holds no state of a pass: what it has to remember stands in `plan.kept[self]`, because several passes may
    be under way at once (a prefix waits while another text runs, activation checkpointing runs a layer again).

    Attributes:
        reads: which states of the instruction it asks `Plan.read` for: `layers`, each layer's input states;
            `encoding`, the bare backbone's last hidden states, from a pass of their own; `nothing`.
    """

    reads: str = "nothing"

    def check(self, backbone: Backbone, name: str) -> None:
        """Check the backbone. Raises UserError if the edit cannot act on its kind; `name` is the method's class."""

    def install(self, site: Site) -> None:
        """Register hooks on parts of the backbone. Raises UserError if a layer lacks what the edit reaches for."""

    def begin(self, plan: Plan) -> None:
        """A pass that holds the soft columns is about to start."""

    def embed(self, plan: Plan, words: Tensor) -> Tensor:
        """The instruction's embeddings (B, N, d) as the model shall see them: asked in the layout `before_instruction`
        alone, since in the other one the instruction has run by then."""
        return words

    def before_layer(self, plan: Plan, layer: int, hidden: Tensor) -> Tensor:
        """The input (B, Q, d) of decoder layer `layer`, in every pass that has a plan."""
        return hidden

    def on_cache(self, plan: Plan) -> CacheEdit | None:
        """Return the function that changes the keys and values of every layer in this pass, or None to keep them."""
        return None

    def following(self, kept: Any) -> Any:
        """Return `plan.kept[self]` for the passes that continue this one; None if they need nothing."""
        return None

    def enter(self, kept: Any, embeds: Tensor) -> Tensor:
        """The embeddings (B, T, d) of what runs first behind a prefix, beginning with the instruction's last token."""
        return embeds

    def repeat(self, kept: Any, copies: int) -> Any:
        """Return `kept` with every row repeated `copies` times, for beams and samples. Only edits whose `following`
        returns something are asked.

        This default is for what does not depend on the row.
        """
        return kept

    @classmethod
    def mix(cls, edits: Sequence[Edit | None], rows: Rows) -> Edit:
        """One edit that does to each row what its adapter's edit does; None leaves an adapter's rows as they are.

        Raises:
            UserError: if edits of this kind, or these ones, cannot share a batch.
        """
        raise UserError(f"adapters: {cls.__name__} of several adapters cannot share a batch")


def check_attention_everywhere(backbone: Backbone, name: str) -> None:
    """Check the backbone's layers. Raises UserError if one is no attention layer; `name` is the method's class."""
    if not is_rewindable(backbone.lm):
        raise UserError(
            f"method: {name} reaches into every layer's attention, and {type(backbone.lm).__name__} has layers of "
            "another kind"
        )


def shared(name: str, values: Sequence[Any]) -> Any:
    """The one value that all adapters of a mixture have, those aside that have None.

    Raises:
        UserError: naming the first that has another.
    """
    first = next(index for index, value in enumerate(values) if value is not None)
    for index, value in enumerate(values):
        if value is not None and value != values[first]:
            raise UserError(
                f"adapters[{index}].{name} = {value!r}: adapters of one batch share it, and adapters[{first}] has "
                f"{values[first]!r}"
            )
    return values[first]


def take(whole: Tensor, columns: Tensor) -> Tensor:
    """Whole (..., K, d), columns (..., n) -> (..., n, d)."""
    return whole.gather(-2, columns[..., None].expand(*columns.shape, whole.shape[-1]))


def put(whole: Tensor, columns: Tensor, part: Tensor) -> Tensor:
    """Whole (..., K, d) with part (..., n, d) at columns (..., n)."""
    return whole.scatter(-2, columns[..., None].expand_as(part), part.to(whole.dtype))
