"""A writer that gives up on a server that is not there for two seconds."""

from dit_scale.checkpoint import writer
from dit_scale.storage import s3, transfer

if __name__ == "__main__":
    transfer.STALL_S = 10.0
    s3.DEADLINE_S = 12.0
    writer.main()
