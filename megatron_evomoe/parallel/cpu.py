"""Adaptations that let megatron-core run on a CPU over Gloo, each with its reason.

megatron-core calls CUDA in many places, although its arithmetic runs on any device. `parallel.backend`
imports this module only where CUDA is not available, so it never affects a run on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


def adapt() -> None:
    """Apply all adaptations, those of ``torch.cuda`` first: megatron-core reads some names at import."""
    _answer_cuda_calls()
    _redirect_cuda_device()
    _adapt_rng()
    _adapt_dispatcher()
    _adapt_uneven_collectives()
    _adapt_optimizer()


class _Immediate:
    """Replaces ``torch.cuda.Stream`` and ``Event``.

    An operation on a CPU is complete when its call returns, so no method has anything to wait for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _Immediate:
        return self

    def query(self) -> bool:
        return True

    def _nothing(self, *args: Any) -> None:
        pass

    wait_stream = wait_event = record = wait = synchronize = _nothing


def _answer_cuda_calls() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"  # used as a `device=` argument everywhere
    cuda.Stream = cuda.Event = _Immediate
    cuda.current_stream = cuda.default_stream = lambda *args: _Immediate()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None
    for name in ("Float", "Int", "Long", "Half", "BFloat16", "Double"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


def _is_cuda(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


def _redirect_cuda_device() -> None:
    """Put tensors on the CPU where megatron-core's code asks for ``device="cuda"``."""

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return wrapped

    # torch records which functions obey ``with torch.device(…)`` when that is first used. It has to record
    # its own functions: if it recorded our wrappers, they would ignore the meta device, and transformers 5
    # would load models whose position and RoPE buffers are never filled.
    with torch.device("cpu"):
        torch.empty(0)
    for name in (
        "tensor",
        "zeros",
        "empty",
        "ones",
        "full",
        "rand",
        "randn",
        "arange",
        "zeros_like",
        "empty_like",
        "ones_like",
        "full_like",
    ):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    to: Any = torch.Tensor.to

    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return to(self, *("cpu" if _is_cuda(a) else a for a in args), **kwargs)

    torch.Tensor.to = to_cpu  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _adapt_rng() -> None:
    """Let the RNG tracker and activation recompute save and restore the CPU generator's state."""
    import megatron.core.tensor_parallel.random as rng

    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()


def _adapt_dispatcher() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    # Without Transformer Engine this name is undefined in 0.16.1, and router_gating_linear reads it.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # all_to_all needs its split sizes as NumPy arrays; the original converts CUDA tensors only.
        return tensor.detach().numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    dispatcher.maybe_move_tensor_to_cpu = to_host


def _adapt_uneven_collectives() -> None:
    """Gather and reduce-scatter pieces of unequal lengths, which Gloo refuses and NCCL accepts.

    Expert-tensor-parallel ranks hold unequal numbers of tokens.
    """
    import megatron.core.tensor_parallel.mappings as mappings

    gather_even, scatter_even = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather_even(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(n) for n in output_split_sizes]
        mine = input_.new_zeros(max(sizes), *input_.shape[1:])
        mine[: len(input_)] = input_
        everyone = [torch.empty_like(mine) for _ in sizes]
        torch.distributed.all_gather(everyone, mine, group=group)
        return torch.cat([piece[:n] for piece, n in zip(everyone, sizes, strict=True)])

    def reduce_scatter(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter_even(input_, group, input_split_sizes, use_global_buffer)
        total = input_.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(n) for n in input_split_sizes])[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter


@contextlib.contextmanager
def _types_named_as_on_cuda() -> Iterator[None]:
    """Let ``tensor.type()`` name CUDA types, with which the optimizers compare it to sort parameters."""
    original = torch.Tensor.type

    def renamed(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = renamed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _adapt_optimizer() -> None:
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    def renaming(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with _types_named_as_on_cuda():
                return function(*args, **kwargs)

        return wrapped

    for cls in (distrib_optimizer.DistributedOptimizer, optimizer.Float16OptimizerWithFloat16Params):
        cls.__init__ = renaming(cls.__init__)
    optimizer.clip_grad_by_total_norm_fp32 = renaming(clip_grads.clip_grad_by_total_norm_fp32)

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        # The original looks up every key of the optimizer's state in `tensors` and raises KeyError for the
        # `step` that torch's Adam keeps there.
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for key, target in {"param": main, **self.optimizer.state[main]}.items():
            if key != "step":
                target.copy_(tensors[key])

    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = set_states
