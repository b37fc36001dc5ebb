"""Convert a Hugging Face model to a checkpoint; the same as ``python -m megatron_evomoe convert-from-hf``.

python tools/convert_from_hf.py LLAVA --output imported
python tools/convert_from_hf.py --language-model LM --vision-model TOWER --output imported
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from megatron_evomoe.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert-from-hf", *sys.argv[1:]]))
