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
over all positions counts. What is allowed stands in `TOLERANCES` and, for models that amplify rounding, follows from a
measurement.
"""

from __future__ import annotations

import time
from typing import Any

from iapt.config.schema import Config
from iapt.model.adapted import AdaptedModel
from iapt.preflight.checks import WHAT, Probe
from iapt.preflight.tools import no_room, undisturbed


def run(config: Config, model: AdaptedModel, *, gradients: bool) -> str:
    """Put what `check` finds into `model.preflight`, unless the configuration says off; returns a line for people.

    Every process runs it: sharded layers need all of them.
    """
    off = config.preflight == "off"
    model.preflight = {"status": "off"} if off else check(model, config.method.name, gradients=gradients)
    return line(model.preflight)


def check(model: AdaptedModel, name: str, *, gradients: bool = True, switch: str = "preflight=off") -> dict[str, Any]:
    """Probe a model on its device. Parameters, gradients, modes and random numbers stay as they were.

    Args:
        model: in any mode.
        name: of its method, for messages.
        gradients: whether it may be trained; else its tensors only have to reach the logits.
        switch: how the caller turns this off, for messages.

    Returns:
        What `summary.json` shows: `status` (passed, or skipped as a whole), `precision`, the `tolerance` that was
        applied, the largest difference of each check in units of the logits' spread, `tensors_with_gradient`, `skipped`
        (what was not checked -> why) and `seconds`.

    Raises:
        UserError: in one line, what differs by how much, or what a library raised.
        torch.OutOfMemoryError: as anywhere else.
    """
    start = time.perf_counter()
    if reason := no_room(model):
        return {"status": "skipped", "skipped": {"all": reason}, "seconds": 0.0}
    with undisturbed(model) as starts:
        probe = Probe(model, name, switch, starts)
        probe.run(gradients)
    return {
        "status": "passed",
        "precision": probe.precision,
        "tolerance": float(f"{probe.tolerance:.3g}"),
        **{what: float(f"{value:.3g}") for what, value in probe.figures.items()},
        "tensors_with_gradient": probe.reached,
        "skipped": probe.skipped,
        "seconds": round(time.perf_counter() - start, 3),
    }


def line(figures: dict[str, Any]) -> str:
    """Describe in one line what `check` found."""
    if figures["status"] != "passed":
        return f"preflight: {figures['status']} {figures.get('skipped', {}).get('all', '')}".rstrip()
    compared = [v for k, v in figures.items() if k in WHAT and k != "moved"]
    skipped = f", skipped {', '.join(figures['skipped'])}" if figures["skipped"] else ""
    return (
        f"preflight: passed in {figures['seconds']:.1f}s, largest difference {max(compared):.1e} of the logits' spread "
        f"(allowed {figures['tolerance']:.0e} in {figures['precision']}){skipped}"
    )
