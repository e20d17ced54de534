"""A writer whose commits take longer than the deadline of a step."""

import time
from typing import Any

from dit_scale.checkpoint import writer

COMMIT_S = 12.0

if __name__ == "__main__":
    write_manifest = writer.write_manifest

    def put_late(*args: Any) -> Any:
        time.sleep(COMMIT_S)
        return write_manifest(*args)

    writer.write_manifest = put_late
    writer.main()
