"""Weight-space methods, all through peft: LoRA and its kin, (IA)^3, layer norm tuning, LLaMA-Adapter ...

A configuration names one of peft's types and fills in that type's own options, so a further method is a further
YAML file. peft's layers are put inside the backbone, whose forward pass stays its own; nothing is merged.

What peft leaves to its caller is done here: modules to adapt where none are named, float32 adapters on any backbone,
an exact off-switch, AdaLoRA's schedule and penalty. PiSSA and OLoRA split W into (W - s B0 A0) + s B A; here W stays
in place and the frozen start (A0, B0) is subtracted from each layer's output, which is the same function. So the
backbone is never changed, and a loaded adapter does not depend on repeating a decomposition bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iapt.config.errors import ConfigError, UserError, suggest
from iapt.config.method import MethodConfig, SizeKnob
from iapt.methods.peft.count import number_of_parameters
from iapt.methods.peft.layers import Start, compute_in_float32, compute_under_autocast
from iapt.methods.peft.options import (
    REFUSED,
    construct,
    filled,
    has_start,
    known_types,
    option_names,
    refusals,
    size_option,
)
from iapt.methods.peft.targets import inject, is_linear
from iapt.methods.registry import MethodSpec, register
from iapt.model.method import WeightMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from iapt.model.backbone import Backbone

_INITS = "true, false, gaussian, orthogonal, olora, pissa, pissa_niter_N"


@dataclass
class PeftConfig(MethodConfig):
    """One of peft's types, and the options of that type."""

    type: str = "???"  # a name of peft's PeftType
    options: dict[str, Any] = field(default_factory=dict)  # fields of that type's configuration; null: peft's default
    size: str | None = None  # the option that budget sets; null: the type's rank

    def problems(self) -> list[str]:
        types = known_types()
        if types.get(self.type):
            return [
                f"method.type = {self.type}: soft prompts are methods of their own here (method=prompt_tuning ...), "
                "since peft's get positions wrong under left padding"
            ]
        if self.type in REFUSED:
            return [f"method.type = {self.type}: not supported, {REFUSED[self.type]}"]
        if self.type not in types:
            offered = {t for t, is_prompt in types.items() if not is_prompt} - set(REFUSED)
            return [f"method.type = {self.type!r}: unknown type of peft; {suggest(self.type.upper(), offered)}"]
        known = option_names(self.type)
        found = [
            f"method.options.{key} = {value!r}: unknown option of {self.type}; {suggest(key, known)}"
            for key, value in self.options.items()
            if key not in known
        ]
        if self.size is not None and self.size not in known:
            found.append(f"method.size = {self.size!r}: unknown option of {self.type}; {suggest(self.size, known)}")
        return found or refusals(self.type, self.options) or self._contradictions()

    def _contradictions(self) -> list[str]:
        found = []
        options = filled(self.type, self.options)
        init = options.get("init_lora_weights", True)
        if not (isinstance(init, bool) or has_start(options) or init in ("gaussian", "orthogonal")):
            found.append(f"method.options.init_lora_weights = {init}: allowed are {_INITS}")
        if has_start(options) and options.get("use_dora"):
            found.append(f"method.options.use_dora = true: not together with init_lora_weights = {init}")
        if self.type == "ADALORA" and not 0 < options["target_r"] < options["init_r"]:
            found.append(
                f"method.options.target_r = {options['target_r']}: must be above 0 and below "
                f"method.options.init_r = {options['init_r']}"
            )
        if not found:
            try:
                construct(self.type, options)
            except (ImportError, TypeError, ValueError) as error:
                found.append(f"method.options = {self.options}: {error}")
        return found

    def size_knob(self) -> SizeKnob | None:
        option = self.size or size_option(self.type)
        return SizeKnob(f"options.{option}") if option else None


class Peft(WeightMethod):
    """peft's layers inside the backbone; this object knows them but holds no copy.

    Buffers that peft draws (VeRA's shared projections and the like) are not saved: they follow from the type's own
    key or from the run's seed.
    """

    def __init__(self, config: PeftConfig, backbone: Backbone) -> None:
        from peft.utils.other import ModulesToSaveWrapper

        super().__init__()
        if found := config.problems():
            raise ConfigError(found)
        lm = backbone.lm
        old = {id(x) for x in (*lm.modules(), *lm.parameters())}
        # Copies, since peft writes into these; on the CPU, since all of them together may be large.
        linears = [m for m in lm.modules() if has_start(config.options) and is_linear(m)]
        weights = {id(m): m.weight.detach().to("cpu", copy=True) for m in linears}
        tuner = inject(config.type, config.options, lm)
        # In plain lists, so that this module does not own (and move, and list) parts of the backbone.
        self._tuner = [tuner]
        new = [m for m in lm.modules() if id(m) not in old]
        self._copies = [m.modules_to_save["default"] for m in new if isinstance(m, ModulesToSaveWrapper)]
        copied = {id(m) for copy in self._copies for m in copy.modules()}  # in eval mode, as the backbone is
        self._parts = [m for m in new if id(m) not in copied]
        own = next((n for n, p in lm.named_parameters() if p.requires_grad and id(p) in old), None)
        if own is not None:
            raise UserError(
                f"method.options = {config.options}: would train the backbone's own {own}, which cannot be switched off"
            )
        if not any(p.requires_grad for p in lm.parameters()):
            raise UserError(f"method.options = {config.options} with method.type = {config.type}: trains nothing here")
        self.starts = nn.ModuleDict()
        if weights:
            self._keep_starts(lm, weights)
        self._keep_float32(config.type, lm)
        self._parameters_by_name = {
            name.replace(".default", ""): parameter
            for name, parameter in lm.named_parameters()
            if parameter.requires_grad
        }

    def _keep_starts(self, lm: nn.Module, weights: dict[int, Tensor]) -> None:
        """Put the backbone's weights back and subtract each layer's frozen start from its output instead."""
        from peft.tuners.lora import LoraLayer

        for name, layer in lm.named_modules():
            if isinstance(layer, LoraLayer) and id(layer.get_base_layer()) in weights:
                weight = layer.get_base_layer().weight
                weight.data = weights[id(layer.get_base_layer())].to(weight.device)
                start = Start(layer)
                self.starts[name.replace(".", "/")] = start
                layer.register_forward_hook(start.subtract)

    def _keep_float32(self, kind: str, lm: PreTrainedModel) -> None:
        """Updates at small rates vanish in half precision; peft upcasts most types, but not all."""
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if lm.dtype == torch.float32:
            return
        for copy in self._copies:
            compute_in_float32(copy, lm.dtype)
        for module in self._parts if kind in ("LN_TUNING", "ADAPTION_PROMPT") else ():
            if kind == "LN_TUNING" and hasattr(module, "ln_tuning_layers"):
                compute_in_float32(module.ln_tuning_layers["default"], lm.dtype)
            elif hasattr(module, "adaption_prompt"):
                compute_under_autocast(module, lm.dtype)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self._parameters_by_name

    def train(self, mode: bool = True) -> Peft:
        super().train(mode)
        for module in self._parts:  # one by one: peft's layers contain the backbone's
            module.training = mode
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self._tuner[0].disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner[0].enable_adapter_layers()


class AdaLora(Peft):
    """AdaLoRA (Zhang et al., ICLR 2023), W' = W + P diag(E) Q: the least important triplets lose their E, until
    `target_r` a module on average are left.

    `tinit` (steps before pruning) is a tenth of the run and `tfinal` (steps after it) a fifth unless given. Only a
    fully pruned adapter is ever chosen as the best, or the untrained one.
    """

    def __init__(self, config: PeftConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self._options = config.options
        self._schedule = self._tuner[0].peft_config["default"]  # the very object that peft's allocator reads
        self._allocator = self._tuner[0].rankallocator

    def on_train_start(self, total_steps: int) -> None:
        """Raises UserError if `tinit` and `tfinal` leave no step to prune in."""
        given = {k: v for k, v in self._options.items() if v is not None}
        first, last = given.get("tinit", total_steps // 10), given.get("tfinal", total_steps // 5)
        if first + last >= total_steps:
            raise UserError(
                f"method.options.tinit = {first}, method.options.tfinal = {last}: together they must be below the "
                f"run's {total_steps} steps"
            )
        self._schedule.total_step, self._schedule.tinit, self._schedule.tfinal = total_steps, first, last

    def penalty(self) -> Tensor:
        """gamma times the mean of ||Q Q^T - I||_F and ||P^T P - I||_F over all modules (peft's form of equation 4)."""
        norms = []
        for name, p in self._parameters_by_name.items():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                norms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)))
        return self._schedule.orth_reg_weight * torch.stack(norms).mean()

    def after_step(self, step: int) -> None:
        # The pruning that ends the schedule goes by importances of steps before it.
        if self._schedule.total_step - self._schedule.tfinal > 1:
            self._tuner[0].update_and_allocate(step)

    def can_be_checkpoint(self, step: int) -> bool:
        """A checkpoint may be taken of the untrained adapter, whose E is zero, and once pruning has ended."""
        return step == 0 or step >= self._schedule.total_step - self._schedule.tfinal

    def training_state(self) -> dict[str, Any]:
        return {
            "importance": dict(self._allocator.exp_avg_ipt),
            "uncertainty": dict(self._allocator.exp_avg_unc),
            "rank_pattern": self._schedule.rank_pattern,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        devices = {name: p.device for name, p in self._tuner[0].model.named_parameters()}
        importance = {name: t.to(devices[name]) for name, t in state["importance"].items()}
        self._allocator.exp_avg_ipt = importance
        self._allocator.exp_avg_unc = {name: t.to(devices[name]) for name, t in state["uncertainty"].items()}
        # peft starts the averages anew for a name that is not in here, and overwrites the values unread.
        self._allocator.ipt = dict(importance)
        self._schedule.rank_pattern = state["rank_pattern"]


def count(config: PeftConfig, backbone: Backbone) -> int:
    """Over the adapted modules (in -> out), layers L and width d:

    LoRA, rsLoRA, PiSSA: r (in + out); DoRA: + out; AdaLoRA (before pruning): init_r (in + out + 1); VeRA: r + out;
    (IA)^3: in of feed-forward projections, out of others; layer norm tuning: the norms' own parameters;
    LLaMA-Adapter: adapter_layers (adapter_len d + 1). LoRA on a tensor of E stacked experts: E times that of one, with
    the rank 2 r where two maps are fused in it, as peft has it.

    Other types, and options that change shapes one by one (`rank_pattern` ...), have no closed form here: a copy of
    the backbone without weights is adapted and counted, or one with weights for the types that compute with them.
    """
    return number_of_parameters(config.type, config.options, backbone.lm)


def build(config: PeftConfig, backbone: Backbone) -> Peft:
    """Build the method. Raises UserError if peft cannot adapt this backbone in the way that is asked for."""
    return AdaLora(config, backbone) if config.type == "ADALORA" else Peft(config, backbone)


register("peft", MethodSpec(PeftConfig, build, count))
