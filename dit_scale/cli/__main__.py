"""`python -m dit_scale.cli`, which is how the deepspeed launcher starts a command."""

import sys

from dit_scale.cli import main

sys.exit(main())
