"""A writer that can be held at a point.

python -m tests.support.ranks.held_writer FOLDER POINT NTH <options of the writer>
"""

import sys
from pathlib import Path

from dit_scale.checkpoint import writer
from tests.support.ranks.points import WRITER_POINTS, Hold

if __name__ == "__main__":
    folder, point, nth = sys.argv[1:4]
    del sys.argv[1:4]
    with WRITER_POINTS[point](Hold(Path(folder), point, int(nth))):
        writer.main()
