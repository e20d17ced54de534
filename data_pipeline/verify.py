"""Read a latent data set again, and with --grid compare it with its images.

python data_pipeline/verify.py URL [--grid compared.png]
"""

import sys

from dit_scale.cli.streams import guarded
from dit_scale_pipeline.verify import main

if __name__ == "__main__":
    sys.exit(guarded(main))
