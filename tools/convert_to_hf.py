"""A checkpoint of any stage to a Hugging Face directory. docs/huggingface.md, section "Out".

python tools/convert_to_hf.py runs/quickstart/route --output exported --verify
python tools/convert_to_hf.py runs/quickstart/evolve --dense --output exported-dense
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.commands import convert_to_hf
from megatron_evomoe.config import ConfigError


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    convert_to_hf.add_arguments(parser)
    try:
        return convert_to_hf.run(parser.parse_args())
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
