"""The registry of routers: each router's class, tensors, initial draws and names in an export.

A new router is an entry here, a module in `moe/routers/`, a class in the exported code
(`hf/remote_code/routing_evomoe.py`) and a value of `moe.router` (`config/model.py`). Everything else that
needs a router's tensors (the inventory, and through it the plan, exports and imports) reads them from here.

Nothing here imports torch or megatron-core, because the converters run without the latter.

Shape legend: C width · N experts · h, r inner width and rank of the dynamic router's hypernetworks.
"""

from __future__ import annotations

import functools
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megatron_evomoe.config import MoEConfig

if TYPE_CHECKING:
    from torch import Tensor

Draw = Callable[["Tensor"], object]
"""Fills a tensor in place from torch's generator, and so says how a fresh one starts."""


class Decoder(Protocol):
    """What a router needs to know of the decoder: a `LanguageConfig`, or the core's `TransformerConfig`."""

    hidden_size: int
    add_bias_linear: bool
    init_method_std: float


class RouterTensor(NamedTuple):
    """One tensor of a router. All of them are whole on every rank."""

    name: str
    """The tensor's name in the router's `named_parameters()`."""
    shape: tuple[int, ...]
    exported: str
    """Its name in a Hugging Face export, below ``mlp.router.``."""
    draw: Draw
    share: float = 1.0
    """Share of the tokens that meet it, for counting FLOP: half, where it serves one modality."""


class RouterKind(NamedTuple):
    """One router."""

    implementation: str
    """``module:class`` below `moe/routers/`; a string, because the class needs megatron-core."""
    tensors: Callable[[MoEConfig, Decoder], Iterator[RouterTensor]]
    """Its tensors, in the order of `named_parameters()`."""

    def load(self) -> type:
        """The class, a `TypedRouter`. Imports megatron-core."""
        module, name = self.implementation.split(":")
        return pkgutil.resolve_name(f"megatron_evomoe.moe.routers.{module}:{name}")


def router_tensors(moe: MoEConfig, decoder: Decoder) -> list[RouterTensor]:
    """The tensors of the configured router, in the order of `named_parameters()`."""
    return list(ROUTERS[moe.router].tensors(moe, decoder))


def draw_router(tensors: Iterable[RouterTensor], values: Mapping[str, Tensor]) -> None:
    """Fill a router's `values` (by name) in place from torch's generator; the caller disables autograd.

    The tensors of submodules are drawn before the router's own, as a module draws its children when it builds
    them.
    """
    for tensor in sorted(tensors, key=lambda t: "." not in t.name):
        tensor.draw(values[tensor.name])


def router_builder(moe: MoEConfig) -> Callable[..., Any]:
    """What `MoESubmodules(router=…)` takes: a callable of (config, pg_collection, …), `moe` bound to it."""
    return functools.partial(ROUTERS[moe.router].load(), moe=moe)


def _normal(std: float) -> Draw:
    return lambda tensor: tensor.normal_(std=std)


def _zeros(tensor: Tensor) -> object:
    return tensor.zero_()


def _terms(std: float, hidden: int) -> Draw:
    """For a generated matrix's terms, stacked along the first axis: h columns of W2, then the bias b2."""

    def draw(tensor: Tensor) -> None:
        tensor.normal_(std=std)
        tensor[:-1].mul_(hidden**-0.5)

    return draw


def _linear(moe: MoEConfig, decoder: Decoder) -> Iterator[RouterTensor]:
    draw = _normal(decoder.init_method_std)
    yield RouterTensor("weight", (moe.num_experts, decoder.hidden_size), "weight", draw)
    if decoder.add_bias_linear:  # megatron-core's router has a bias where all linear layers have one
        yield RouterTensor("bias", (moe.num_experts,), "bias", _zeros)


def _modality_linear(moe: MoEConfig, decoder: Decoder) -> Iterator[RouterTensor]:
    shape, draw = (moe.num_experts, decoder.hidden_size), _normal(decoder.init_method_std)
    for modality in ("text", "vision"):
        yield RouterTensor(f"weight_{modality}", shape, f"{modality}.weight", draw, share=0.5)


def _dtr(moe: MoEConfig, decoder: Decoder) -> Iterator[RouterTensor]:
    """The dynamic token-aware router (EvoMoE, Eq. 4-5; `moe/dtr/maths.py`).

    With these draws only the logits depend on C, as a linear router's do. For z of unit mean square, e has
    unit variance; Θ_down·z has unit variance and Θ_up·s that of s, in each case half from the token-dependent
    part and half from b2. So E is about as large as z whatever C, h and r are, and φ gives logits of standard
    deviation 0.6·dtr_init_std·√C. Only b1 starts at zero: a zero W2 would stop the gradient of W1, and a
    zero Θ_up the gradient of everything before it.
    """
    N, C, h, r = moe.num_experts, decoder.hidden_size, moe.dtr_hidden_size, moe.dtr_rank
    yield RouterTensor("phi", (N, C), "phi.weight", _normal(moe.dtr_init_std))
    shapes_and_draws: dict[str, tuple[tuple[int, ...], Draw]] = {
        "weight1": ((h, C), _normal(C**-0.5)),
        "bias1": ((h,), _zeros),
        "weight2_down": ((h + 1, 2 * r, C), _terms((2 * C) ** -0.5, h)),
        "weight2_up": ((h + 1, r, C), _terms((2 * r) ** -0.5, h)),
    }
    for modality in ("text", "vision"):
        for name, (shape, draw) in shapes_and_draws.items():
            name = f"{modality}.{name}"
            yield RouterTensor(name, shape, name, draw, share=0.5)


def _cosine(moe: MoEConfig, decoder: Decoder) -> Iterator[RouterTensor]:
    draw = _normal(decoder.init_method_std)  # the direction alone counts; Adam turns shorter rows faster
    yield RouterTensor("centroids", (moe.num_experts, decoder.hidden_size), "centroids", draw)
    at_half = math.log(1 / 0.5)  # a temperature of 0.5
    yield RouterTensor("log_scale", (1,), "log_scale", lambda tensor: tensor.fill_(at_half))


ROUTERS = {
    "linear": RouterKind("linear:LinearRouter", _linear),
    "modality-linear": RouterKind("linear:ModalityLinearRouter", _modality_linear),
    "dtr": RouterKind("dynamic:DynamicTokenRouter", _dtr),
    "cosine": RouterKind("cosine:CosineRouter", _cosine),
}
"""Value of `moe.router` -> the router."""
