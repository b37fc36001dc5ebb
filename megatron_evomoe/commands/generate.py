"""``generate``: answer a prompt with an exported model, or start a chat."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_evomoe.config.arguments import number, whole
from megatron_evomoe.generate.chat import chat, reply
from megatron_evomoe.generate.dialogue import Dialogue
from megatron_evomoe.generate.loading import DTYPE_CHOICES, ModelError, check_directory, greedy, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--model", required=True, type=Path, help="directory written by convert-to-hf, or a LLaVA model's"
    )
    parser.add_argument(
        "--image", action="append", default=[], type=Path, help="an image to ask about; may be repeated"
    )
    parser.add_argument("--prompt", help="the question; without it, a chat on standard input starts")
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1, 2**20),
        default=512,
        help="longest answer in tokens (default %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=number(0, 1e6),
        default=0.0,
        help="sampling temperature; 0 takes the most likely token (default %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=number(0, 1, above=True),
        default=1.0,
        help="sample from the smallest set of tokens with this probability (default %(default)s)",
    )
    parser.add_argument(
        "--num-beams", type=whole(1, 1024), default=1, help="beams of beam search (default %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, help="seed of sampling (default %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPE_CHOICES,
        help="dtype of the weights (default: the directory's)",
    )
    parser.add_argument("--device", help="cuda:0, cpu, … (default: the GPU, or the CPU without one)")


def run(args: argparse.Namespace) -> int:
    """Print the answer, or chat on standard input.

    Raises:
        ModelError: the model, an image or a flag cannot be used.
    """
    settings = generation_settings(args)
    check_directory(args.model)
    dialogue = Dialogue()
    for path in args.image:
        dialogue.attach(path)
    model = load(args.model, args.dtype, args.device)
    _seed(args.seed)
    if args.prompt is None:
        chat(model, dialogue, settings)
    else:
        dialogue.ask(args.prompt)
        reply(model, dialogue, settings, print_text=lambda text: print(text, end="", flush=True))
    return 0


def generation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as arguments of transformers' ``generate``.

    Raises:
        ModelError: the temperature is so low that logits divided by it would overflow.
    """
    if 0 < args.temperature < 1e-3:
        raise ModelError(
            f"--temperature {args.temperature:g} is too low to sample with; give 0, or at least 0.001"
        )
    settings = {**greedy(args.max_new_tokens), "num_beams": args.num_beams}
    if args.temperature > 0:
        settings |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    return settings


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)
