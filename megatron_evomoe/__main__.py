"""``python -m megatron_evomoe``."""

import sys

from megatron_evomoe.cli import main

if __name__ == "__main__":  # checkpoint writers re-import this module in processes of their own
    sys.exit(main())
