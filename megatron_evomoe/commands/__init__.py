"""The commands of ``python -m megatron_evomoe``: one file each, named for its command."""
