"""A real S3 server on loopback, and what tests do with it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3

BUCKET = "results"


def variables(address: str) -> dict[str, str]:
    """What the environment says of the server."""
    return {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Address of a server with one empty bucket; it runs as long as the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.1)
        address = f"http://127.0.0.1:{port}"
        client(address).create_bucket(Bucket=BUCKET)
        yield address
    finally:
        server.terminate()
        server.wait()


def client(address: str):
    """The library of the maker of S3, as an eye of its own on what is in a bucket."""
    names = {"aws_access_key_id": "somebody", "aws_secret_access_key": "very-secret", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=address, **names)


def files(address: str, prefix: str) -> dict[str, bytes]:
    """All files below a prefix."""
    s3 = client(address)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    names = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return {name: s3.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names}
