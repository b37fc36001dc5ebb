"""A Hugging Face model to a checkpoint that ``train --load`` takes under any layout. docs/huggingface.md,
section "In".

python tools/convert_from_hf.py LLAVA --output imported
python tools/convert_from_hf.py --language-model LM --vision-model TOWER --output imported
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.commands import convert_from_hf
from megatron_evomoe.config import ConfigError, flags_from


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    convert_from_hf.add_arguments(parser)
    args = parser.parse_args()
    try:
        return convert_from_hf.run(args, flags_from(args))
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
