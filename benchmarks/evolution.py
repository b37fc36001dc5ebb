"""Share of a stage II training step that expert evolution takes, at the paper's sizes.

    python benchmarks/evolution.py [--tokens 1024] [--json evolution.json]

Times ``EvolvingMLP.evolve()`` for every rule, and the forward and backward pass of two layers: the evolving
layer (attention frozen, FFN trained) and the frozen dense layer next to it, since the paper evolves every
second layer. The denominator leaves out embeddings, vision tower, loss and the optimizer's own step, so the
shares are upper bounds. On a CPU, T tokens are timed and the time per token is taken as constant; a second
measurement at half as many tokens shows how well that holds. Attention over longer sequences would make the
share smaller.

Prints Markdown; ``--json`` writes the numbers as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

from megatron_evomoe.parallel import backend  # noqa: E402

TOKENS_FULL = 64 * 2048 // 8
"""Tokens per GPU and step of the paper's stage II on 8 GPUs: 64 samples of at most 2048 tokens."""
TOKENS_USUAL = 64 * 800 // 8
"""Tokens per GPU and step at about 800 tokens per sample, 576 of an image and a short dialogue.

For LLaVA-mix-665k this is a deliberately low estimate.
"""


def build(args: argparse.Namespace, evolves: bool, rule: str = "delta") -> Any:
    """A frozen decoder layer of megatron-core's own parts; its FFN trains and evolves if `evolves`."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_evomoe.config import MoEConfig
    from megatron_evomoe.moe.evolving_mlp import evolving_mlp_spec

    dtype = torch.bfloat16 if backend.on_gpu() else torch.float32
    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.hidden,
        ffn_hidden_size=args.ffn,
        num_attention_heads=args.hidden // 128,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="LayerNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not backend.on_gpu(),
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec()
    if evolves:
        spec.submodules.mlp = evolving_mlp_spec(spec.submodules.mlp, MoEConfig(evolution_rule=rule))
    layer = build_module(spec, config=config, layer_number=1).to(backend.device())
    for name, p in layer.named_parameters():
        torch.nn.init.normal_(p, std=0.02)
        p.requires_grad_(evolves and ".mlp." in f".{name}")
        p.main_grad = torch.zeros_like(p, dtype=torch.float32) if p.requires_grad else None
    return layer


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Least of several times of `work`: wall time on a GPU, CPU seconds of all threads on a CPU.

    CPU seconds, because another process on the machine stretches a long step's wall time more than a short
    one's.
    """
    clock = time.perf_counter if backend.on_gpu() else time.process_time
    best = float("inf")
    for _ in range(repeats + 1):  # one more, because the first allocates memory
        start = clock()
        work()
        if backend.on_gpu():
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best


def step_seconds(layer: Any, tokens: int, hidden: int, repeats: int) -> float:
    """Seconds of forward and backward of one layer over one sequence of `tokens`.

    The input requires a gradient, as it does within a stack of layers.
    """
    dtype = next(layer.parameters()).dtype
    x = torch.randn(tokens, 1, hidden, device=backend.device(), dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 1, tokens, tokens, device=backend.device()).tril() < 0.5

    def step() -> None:
        out, _ = layer(x, attention_mask=mask)
        out.sum().backward()
        for p in (x, *layer.parameters()):
            p.grad = None

    return seconds(step, repeats)


def evolve_seconds(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of one `evolve()`, by rule and number of experts kept on the rank."""
    from megatron_evomoe.moe.evolution_rules import RULES
    from megatron_evomoe.moe.evolving_mlp import EvolvingMLP

    times: dict[str, dict[str, float]] = {}
    owned = EvolvingMLP.owned
    for rule in RULES:
        times[rule] = {}
        for kept in (3, 1):
            EvolvingMLP.owned = property(lambda self, kept=kept: list(range(1, kept + 1)))
            mlp = build(args, evolves=True, rule=rule).mlp
            mlp.begin()
            times[rule][str(kept)] = seconds(lambda mlp=mlp: mlp.evolve(1, 1234), args.repeats * 3)
            EvolvingMLP.owned = owned
    return times


def measure(args: argparse.Namespace) -> dict[str, Any]:
    evolving, dense = build(args, evolves=True), build(args, evolves=False)
    per_token = {}
    for tokens in (args.tokens // 2, args.tokens):
        per_token[str(tokens)] = {
            name: step_seconds(layer, tokens, args.hidden, args.repeats) / tokens
            for name, layer in (("evolving layer", evolving), ("dense layer", dense))
        }
    return {
        "environment": environment(),
        "hidden": args.hidden,
        "ffn": args.ffn,
        "tokens_timed": args.tokens,
        "seconds_per_token": per_token,
        "evolve_seconds": evolve_seconds(args),
    }


def environment() -> dict[str, Any]:
    def out(*command: str) -> str:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        ).stdout.strip()

    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "device": torch.cuda.get_device_name() if backend.on_gpu() else model,
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        "commit": out("git", "rev-parse", "--short", "HEAD")
        + ("+" if out("git", "status", "--porcelain", "megatron_evomoe/moe") else ""),
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def report(result: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    per_token = {t: sum(v.values()) for t, v in result["seconds_per_token"].items()}
    pair = per_token[str(result["tokens_timed"])]
    env = result["environment"]
    unit = "wall time" if backend.on_gpu() else "CPU seconds of all threads"
    lines = [
        f"{env['device']}, {env['threads']} threads, load {env['load'][0]}; torch {env['torch']}, "
        "megatron-core "
        f"{env['megatron-core']}, Python {env['python']}; commit {env['commit']}; `{env['command']}`",
        "",
        f"In {unit}. C = {result['hidden']}, FFN {result['ffn']} (gated); forward + backward of an evolving "
        "and a dense "
        "layer: " + ", ".join(f"{1e3 * s:.3f} ms/token at T = {t}" for t, s in per_token.items()),
        "",
        "| rule | experts kept | evolve() | share at 16384 tokens/rank | share at 6400 | share at the T "
        "timed |",
        "|---|---|---|---|---|---|",
    ]
    for rule, kept in result["evolve_seconds"].items():
        for n, s in kept.items():
            shares = [
                f"{100 * s / (pair * t):.2f} %" for t in (TOKENS_FULL, TOKENS_USUAL, result["tokens_timed"])
            ]
            lines.append(f"| {rule} | {n} | {1e3 * s:.1f} ms | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=2048, help="width C")
    parser.add_argument("--ffn", type=int, default=5504, help="width of the FFN")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the timed step")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps; the least counts")
    parser.add_argument("--threads", type=int, help="of torch; default torch's own")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    backend.prepare()
    if args.threads:
        torch.set_num_threads(args.threads)
    backend.init_process_group(timeout_minutes=1)
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(1, 1)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    result = measure(args)
    print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
