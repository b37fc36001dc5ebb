"""What commands that are forked from one process have in memory already (quick.py)."""

from megatron_evomoe.parallel import backend

backend.prepare()

import megatron_evomoe.train.loop  # noqa: E402, F401
