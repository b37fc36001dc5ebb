"""Speed of our training step compared with a peer's: the same model, built of transformers' modules.

    python benchmarks/peer.py --output peer.json
    python benchmarks/peer.py --train router  # as `route`; default: router and experts, as MoE-LLaVA
    python benchmarks/peer.py --tiny

The peer is in peer_model.py; stage and batch are the same too. Both sides start from the same weights and
first take --loss-steps steps, whose losses must agree to --tolerance. Then each side takes one optimizer step
per round, the peer with both ways of dispatch, eager and compiled. Like DeepSpeed and like this package, the
peer keeps fp32 copies of the bf16 weights that it trains. Without them most updates would be rounded away,
and the losses would differ.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure  # noqa: E402
import torch  # noqa: E402

from megatron_evomoe.parallel import backend  # noqa: E402

Run = Callable[[], float]
TRAINED = {"experts": ("experts", "router"), "router": ("router",)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--train", choices=list(TRAINED), default="experts", help="experts and router, or the router alone"
    )
    parser.add_argument("--layers", type=int, default=8, help="of the Qwen-1.8B-shaped model")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=2, help="per optimizer step")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--loss-steps", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=0.01, help="largest relative difference of losses")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model and batch, one round: plumbing only"
    )
    parser.add_argument("--output", type=Path, help="write figures and circumstances as JSON")
    args = parser.parse_args()
    if args.tiny:
        args.layers, args.seq_length, args.micro_batch, args.microbatches, args.rounds = 2, 64, 2, 2, 1
    return args


def run_config(args: argparse.Namespace) -> Any:
    """Configuration of our side, which computes what the peer computes.

    It has a linear router, top-2 routing and renormalised weights, and drops no token.
    """
    import shapes

    from megatron_evomoe.model.transformer_config import resolve_transformer_impl

    config = shapes.model_config(
        "1.8b",
        args.layers,
        tiny=args.tiny,
        seq_length=args.seq_length,
        micro_batch=args.micro_batch,
        microbatches=args.microbatches,
        moe={"router": "linear", "moe_router_topk": 2, "router_gate": "straight_through"},
        language={
            "num_layers": args.layers,
            "add_qkv_bias": True,
            "tie_word_embeddings": False,
            **({"vocab_size": 256} if args.tiny else {}),
        },
        train={"bf16": args.precision == "bf16", "trainable": list(TRAINED[args.train])},
    )
    config.moe.moe_grouped_gemm = resolve_transformer_impl(config) == "transformer_engine"
    return config.for_stage("route")


class PeerTraining:
    """Training of the peer: AdamW, fused on a GPU, over fp32 copies of the trained weights."""

    def __init__(self, peer: Any, trained: tuple[str, ...], config: Any, step: Any) -> None:
        self.peer, self.step = peer, step
        self.parameters = peer.train_parts(trained)
        self.masters = [p.detach().float().clone() for p in self.parameters]
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=o.lr,
            betas=(o.adam_beta1, o.adam_beta2),
            eps=o.adam_eps,
            weight_decay=0.0,
            fused=backend.on_gpu(),
        )

    def take_step(self, forward: Callable[..., Any], dispatch: str) -> float:
        """Take one optimizer step with gradient clipping over the microbatches; return the mean loss."""
        self.peer.use(dispatch)
        m, losses = len(self.step.microbatches), []
        for micro in self.step.microbatches:
            loss = forward(micro.tokens, micro.token_types, micro.images, micro.labels)
            ((loss + self.peer.balance()) / m).backward()
            losses.append(loss.detach())
        self._update()
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def _update(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        torch._foreach_copy_(self.parameters, self.masters)


def build_peer(
    config: Any, trained: tuple[str, ...], ours: Any, step: Any
) -> tuple[dict[str, Run], dict[str, str]]:
    """The peer's optimizer step by name, and the reason for each one that does not work here.

    All steps train one model, which starts from our weights.
    """
    import peer_model

    peer = peer_model.Peer(config).to(backend.device())
    # Only parameters are converted, not buffers: RoPE's frequencies need fp32.
    for parameter in peer.parameters() if config.train.bf16 else ():
        parameter.data = parameter.data.bfloat16()
    peer_model.load(peer, ours, config)
    training = PeerTraining(peer, trained, config, step)
    eager = {name: functools.partial(training.take_step, peer, name) for name in peer_model.DISPATCH}
    if not backend.on_gpu():
        return eager, {f"{name}, compiled": "only on a GPU" for name in eager}
    fast = torch.compile(peer)
    return eager | {
        f"{name}, compiled": functools.partial(training.take_step, fast, name) for name in eager
    }, {}


def markdown(report: dict[str, Any]) -> str:
    """Markdown table of a report."""
    c, seconds = report["circumstances"], report["seconds"]
    fastest = min(
        (name for name in seconds if name != "ours"), key=lambda name: seconds[name], default="none"
    )
    rows = [
        [name, f"{1e3 * s:.1f}", f"{report['tokens'] / s:.0f}", f"{s / seconds['ours']:.2f}"]
        for name, s in seconds.items()
    ]
    tiny = " **Tiny models: these figures mean nothing.**" if c["tiny"] else ""
    where = (
        f"{c['layers']} layers, {c['trained']} trained, {c['precision']}, on {c['device']}, commit "
        f"{c['commit']}"
    )
    notes = [f"\n{name} is left out: {reason}." for name, reason in report["skipped"].items()]
    return "\n".join(
        [
            f"One optimizer step of ours and of a peer made of transformers' modules: {where}.{tiny}",
            "",
            measure.table(["", "ms", "tokens/s", "time ÷ ours"], rows),
            f"\nFastest peer: {fastest}. Losses of {len(report['losses']['ours'])} steps from the same "
            "weights differ by at most "
            f"{report['loss_difference']:.1e} (relative), "
            f"{'within' if report['equal_loss'] else 'NOT WITHIN'} {c['tolerance']:g}.",
            *notes,
            "",
        ]
    )


def main() -> None:
    args = parse_args()
    if importlib.util.find_spec("transformers") is None:
        sys.exit("the peer is made of transformers' modules, and transformers is not installed")
    backend.prepare()
    backend.init_process_group(timeout_minutes=5)
    import shapes
    from step import ours

    from megatron_evomoe.parallel import topology

    config, built = run_config(args), {}
    topology.initialize(config)
    topology.seed_everything(config.train.seed)
    step = shapes.random_step(config)
    run_ours = ours(config, "route", step, built)
    steps, skipped = build_peer(config, TRAINED[args.train], built["route"].modules[0], step)
    losses = {
        "ours": [run_ours() for _ in range(args.loss_steps)],
        "peer": [steps["loop"]() for _ in range(args.loss_steps)],
    }
    difference = max(abs(a / b - 1) for a, b in zip(losses["peer"], losses["ours"], strict=True))
    seconds = measure.alternate({"ours": run_ours, **measure.working(steps, skipped)}, args.rounds)
    report = {
        "circumstances": measure.circumstances(
            tiny=args.tiny,
            rounds=args.rounds,
            layers=args.layers,
            precision=args.precision,
            trained=" and ".join(TRAINED[args.train]),
            tolerance=args.tolerance,
            seq_length=args.seq_length,
            micro_batch=args.micro_batch,
            microbatches=args.microbatches,
        ),
        "tokens": sum(micro.tokens.numel() for micro in step.microbatches),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds_range": {name: [min(values), max(values)] for name, values in seconds.items()},
        "losses": losses,
        "loss_difference": difference,
        "equal_loss": difference <= args.tolerance,
        "skipped": skipped,
    }
    print(markdown(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    torch.distributed.destroy_process_group()
    sys.exit(0 if report["equal_loss"] else 1)


if __name__ == "__main__":
    main()
