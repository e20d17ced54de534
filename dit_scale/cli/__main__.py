"""Run `python -m dit_scale.cli`: the deepspeed launcher starts commands this way."""

import sys

from dit_scale.cli import main

sys.exit(main())
