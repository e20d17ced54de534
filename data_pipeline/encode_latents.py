"""`dit-scale encode` as a file, which `ray job submit` can start in a copy of the working directory.

    python data_pipeline/encode_latents.py --config encode_imagenet_256 [key=value ...]
    ray job submit --working-dir . -- python data_pipeline/encode_latents.py --config ... output=s3://...

Python finds dit_scale_pipeline beside this file; dit_scale is installed, or in the working directory of
`ray job submit`.
"""

import sys

from dit_scale.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "encode")
    sys.exit(main())
