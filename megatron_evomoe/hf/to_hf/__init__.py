"""Checkpoints out: a checkpoint of any stage becomes a directory that transformers loads."""
