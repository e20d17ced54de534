"""An S3 server on loopback for tests: moto over real HTTP, and its environment variables."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from moto.moto_server.threaded_moto_server import ThreadedMotoServer

BUCKET = "latents"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start the server with an empty bucket; yield the variables that point boto3 at it."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        make_bucket(environment, BUCKET)
        yield environment
    finally:
        server.stop()
        assert server._server is not None
        server._server.server_close()


def make_bucket(environment: dict[str, str], bucket: str) -> None:
    """Make an empty bucket on the server that these variables point to."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )
    with closing(client):
        client.create_bucket(Bucket=bucket)
