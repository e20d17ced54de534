"""Read a latent data set again from the first byte to the last and say what is wrong with it.

    python data_pipeline/verify.py URL

`dit_scale/data/verify.py` says what is looked at. Exit code 1 when anything does not fit.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Found also where the package is not installed; as a script, Python looks beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from dit_scale.data.verify import sound, verify
from dit_scale.errors import DitScaleError
from dit_scale.storage import open_storage


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 sound, 1 damaged, 2 no finished data set."""
    parser = argparse.ArgumentParser(description="Verify a latent data set completely.")
    parser.add_argument("url", help="its folder or s3:// prefix")
    parser.add_argument("--threads", type=int, default=4, help="shards read at once, each is held in memory")
    options = parser.parse_args(arguments)
    try:
        info, problems = verify(open_storage(options.url), options.threads, Console(stderr=True))
    except DitScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"wrong: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(sound(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
