"""A writer that gives up quickly when the server is down."""

from dit_scale.checkpoint import writer
from dit_scale.storage import s3, transfer
from tests.support.speed import scaled

if __name__ == "__main__":
    transfer.STALL_S = scaled(10.0)
    s3.DEADLINE_S = scaled(12.0)
    writer.main()
