"""``convert-from-hf``: convert a Hugging Face model to a checkpoint (see docs/huggingface.md)."""

from __future__ import annotations

import argparse

from megatron_evomoe.config import ConfigError, flags_from
from megatron_evomoe.hf.from_hf.importing import CONVERSIONS, Request, describe, import_model
from megatron_evomoe.moe.router import ROUTERS

_FIELDS = {
    "num-experts": "experts per mixture layer",
    "moe-layer-freq": "every k-th layer is a mixture, or a list of 0/1",
    "moe-router-topk": "experts per token",
    "router": " or ".join(ROUTERS),
    "dtr-hidden-size": "h of the DTR",
    "dtr-rank": "r of the DTR",
    "expert-init-noise": "for noise: standard deviation in units of each matrix's own",
    "seed": "of the noise and the fresh routers",
    "vision-feature-layer": "which hidden state of the tower is the feature",
    "vision-feature-select": "patch or cls_patch",
    "make-vocab-size-divisible-by": "padding of the embedding",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", nargs="?", help="a LLaVA model, or an export of ours: directory or hub id")
    parser.add_argument("--model", dest="model_flag", help="the same, as a flag")
    parser.add_argument(
        "--language-model", help="instead: a language model's directory or hub id; the projector starts fresh"
    )
    parser.add_argument(
        "--vision-model",
        help="a CLIP or SigLIP directory or hub id; also for a LLaVA model that lacks its tower",
    )
    parser.add_argument("--output", required=True, help="directory to make; must not hold anything")
    parser.add_argument(
        "--expert-init",
        choices=["none", "replicate", "noise"],
        default="none",
        help="make a mixture of the dense model: each expert a copy, or a copy with noise (default: stay "
        "dense)",
    )
    parser.add_argument(
        "--dtype",
        choices=list(CONVERSIONS),
        default="keep",
        help="type of the weights written (default: as they are)",
    )
    parser.add_argument(
        "--resize-embeddings",
        action="store_true",
        help="add rows for ids of the tokenizer that the embedding lacks, each the mean of the rows there "
        "are",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare with the source: every tensor, and logits where they fit",
    )
    parser.add_argument(
        "--allow-remote-code",
        action="store_true",
        help="take a directory that asks for its own code for what its model_type says; no code is run",
    )
    for name, what in _FIELDS.items():
        parser.add_argument(f"--{name}", dest=f"cfg_{name.replace('-', '_')}", metavar="VALUE", help=what)


def run(args: argparse.Namespace) -> int:
    """Convert, say what was done, and verify if asked; 1 if the verification fails.

    Raises:
        ConfigError, CheckpointError: as `import_model`.
    """
    if args.model and args.model_flag:
        raise ConfigError(f"two models are given: {args.model} and {args.model_flag}")
    request = Request(
        output=args.output,
        model=args.model or args.model_flag,
        language_model=args.language_model,
        vision_model=args.vision_model,
        allow_remote_code=args.allow_remote_code,
        dtype=args.dtype,
        expert_init=args.expert_init,
        resize_embeddings=args.resize_embeddings,
        flags=flags_from(args),
    )
    imported = import_model(request)
    print(describe(imported))
    if args.verify:
        from megatron_evomoe.hf import verification
        from megatron_evomoe.hf.from_hf import verify_import

        rows = verify_import.compare(request, imported)
        print(verification.table(rows))
        return 0 if all(row.good for row in rows) else 1
    return 0
