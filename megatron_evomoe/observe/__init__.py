"""Record -> reduce -> report."""

from megatron_evomoe.observe.log import RunLogger
from megatron_evomoe.observe.metrics import Meter, unpack

__all__ = ["Meter", "RunLogger", "unpack"]
