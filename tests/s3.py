"""An S3-protocol server on loopback, behind a proxy that can inject faults."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from tests.faulty_proxy import FaultyProxy, faulty_proxy


@contextmanager
def s3_bucket(monkeypatch: pytest.MonkeyPatch, rate: float, seed: int = 0) -> Iterator[tuple[str, FaultyProxy]]:
    """URL of a new bucket that s3:// reaches through a proxy which fails at `rate`, and the proxy."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # connections stay open after a test, and go to the server of that test
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=bucket)
    with faulty_proxy((host, port), rate, seed) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        try:
            yield f"s3://{bucket}", proxy
        finally:
            server.stop()
