"""`dit-scale encode` as a script, for `ray job submit` and for a clone that is not installed.

    python data_pipeline/encode_latents.py --config encode_imagenet_256 [key=value ...]
    ray job submit --working-dir . -- python data_pipeline/encode_latents.py --config ... output=s3://...

Python finds dit_scale_pipeline next to this file. It finds dit_scale on PYTHONPATH, where Ray puts the
working directory of a submitted job, or among the installed packages.
"""

import sys

from dit_scale.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "encode")
    sys.exit(main())
