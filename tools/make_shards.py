"""LLaVA JSON and images to webdataset shards; the same as ``python -m megatron_evomoe make-shards``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data import make_shards


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    make_shards.add_arguments(parser)
    try:
        return make_shards.run(parser.parse_args())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
