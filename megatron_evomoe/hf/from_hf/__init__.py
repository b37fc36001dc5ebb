"""Hugging Face models in: a directory or hub id becomes a checkpoint that ``train --load`` takes."""
