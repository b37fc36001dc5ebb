"""``convert-from-hf``: convert a Hugging Face model to a checkpoint (see docs/huggingface.md)."""

from __future__ import annotations

import argparse

from megatron_evomoe.config import ConfigError, flags_from
from megatron_evomoe.config.kinds import MIXTURE_KINDS, StageKind
from megatron_evomoe.hf.from_hf.importing import CONVERSIONS, Imported, Request, import_model
from megatron_evomoe.moe.router import ROUTERS

_FIELDS = {
    "num-experts": "experts of a mixture",
    "moe-layer-freq": "k for a mixture in every k-th layer, or a list of 0 and 1",
    "moe-router-topk": "experts of each token",
    "router": " or ".join(ROUTERS),
    "dtr-hidden-size": "width h of the hypernetworks of the dtr router",
    "dtr-rank": "rank r of the routers that the dtr hypernetworks generate",
    "expert-init-noise": "standard deviation of the noise, relative to that of each matrix",
    "seed": "seed of the noise and of new routers",
    "vision-feature-layer": "hidden state of the vision tower that is the image feature",
    "vision-feature-select": "patch or cls_patch, which keeps the class token",
    "make-vocab-size-divisible-by": "the embedding is padded to a multiple of this",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "model", nargs="?", help="LLaVA model, or a directory written by convert-to-hf: directory or hub id"
    )
    parser.add_argument("--model", dest="model_flag", help="the same as the positional argument")
    parser.add_argument(
        "--language-model",
        help="instead of a LLaVA model: language model, directory or hub id; the projector gets new weights",
    )
    parser.add_argument(
        "--vision-model",
        help="CLIP or SigLIP model, directory or hub id; also with a LLaVA model that lacks its tower",
    )
    parser.add_argument("--output", required=True, help="directory to create; must not exist, or be empty")
    parser.add_argument(
        "--expert-init",
        choices=["none", "replicate", "noise"],
        default="none",
        help="make a mixture of experts: each expert is a copy of the dense FFN, or a copy with noise "
        "(default: none, stay dense)",
    )
    parser.add_argument(
        "--dtype",
        choices=list(CONVERSIONS),
        default="keep",
        help="dtype of the weights (default: keep, as in the source)",
    )
    parser.add_argument(
        "--resize-embeddings",
        action="store_true",
        help="add rows to the embedding for token ids that have none, each the mean of the other rows",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every tensor with the source's, and the logits if both models fit in memory",
    )
    parser.add_argument(
        "--allow-remote-code",
        action="store_true",
        help="import a model that asks to run its own code as its model_type says; no code is run",
    )
    for name, what in _FIELDS.items():
        parser.add_argument(f"--{name}", dest=f"cfg_{name.replace('-', '_')}", metavar="VALUE", help=what)


def run(args: argparse.Namespace) -> int:
    """Convert, report, and verify if requested; returns 1 if the verification fails.

    Raises:
        ConfigError, CheckpointError: as `import_model`.
    """
    if args.model and args.model_flag:
        raise ConfigError(f"two models are given, {args.model} and --model {args.model_flag}; give one")
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


def describe(imported: Imported) -> str:
    """A report of the import, which ends with the command that trains on it."""
    lm, vision, moe = imported.config.language, imported.config.vision, imported.config.moe
    lines = [
        f"{imported.checkpoint}: {imported.tensors} tensors read, {imported.parameters:,} parameters written"
    ]
    if "vision_model" in imported.parts:
        lines.append(
            f"  vision tower    {vision.model_type}, {vision.num_layers_used} of {vision.num_layers} layers, "
            f"{vision.hidden_size} wide, {vision.image_size} pixels, {vision.tokens_per_image} tokens per "
            "image"
        )
    if "language_model" in imported.parts:
        lines.append(
            f"  language model  {lm.num_layers} layers, {lm.hidden_size} wide, vocabulary {lm.vocab_size}"
        )
    lines += [f"  {note}" for note in imported.notes]
    if imported.kind in MIXTURE_KINDS:
        mixtures = sum(moe.layer_pattern(lm.num_layers))
        lines.append(
            f"  mixture         {moe.num_experts} experts in {mixtures} layers"
            f"{f', {moe.router} router' if imported.kind == StageKind.ROUTE else ', no router yet'}"
        )
    if "vision_projection" not in imported.parts:
        lines.append("  the projector will start from new weights")
    if imported.left_out:
        lines.append(
            f"  left out: {len(imported.left_out)} tensors that LLaVA does not use (last layers of the "
            "tower, buffers, a tied output layer)"
        )
    tokenizer = f" --tokenizer {imported.tokenizer}" if imported.tokenizer else ""
    lines.append(
        "train on with: python -m megatron_evomoe train --config RUN.yaml --preset "
        f"{imported.output}/model.yaml "
        f"--load {imported.output}{tokenizer}"
    )
    return "\n".join(lines)
