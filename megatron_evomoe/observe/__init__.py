"""Where a run's numbers, messages and traces go."""

from megatron_evomoe.observe.log import RunLogger

__all__ = ["RunLogger"]
