"""Names a bucket, and connects to it with what the standard variables say.

Credentials, region and endpoint come from the environment alone, so that no file of a project ever holds a secret.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from surgeon.errors import StoreError

if TYPE_CHECKING:
    from obstore.store import ObjectStore, S3Config

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PART = re.compile(r"[A-Za-z0-9!_.*'()=+-]+")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_ROLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
)
"""Other ways to be known: of Kubernetes, of containers, of virtual machines."""


@dataclass(frozen=True)
class Patience:
    """How long a request may take, and how often it is tried again.

    Attributes:
        connect_s: seconds until a connection stands.
        request_s: seconds of one request, its content included.
        retries: after a failure that may pass.
        total_s: seconds after which nothing is tried again.
    """

    connect_s: int
    request_s: int
    retries: int
    total_s: int


FIRST_CONTACT = Patience(connect_s=3, request_s=10, retries=2, total_s=10)
AT_WORK = Patience(connect_s=10, request_s=300, retries=8, total_s=120)


@dataclass(frozen=True)
class BucketAddress:
    """A bucket and a prefix in it.

    Attributes:
        bucket: name.
        prefix: path without a slash at either end; "" for the whole bucket.
    """

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> "BucketAddress":
        """The address of "s3://bucket/prefix".

        Raises:
            StoreError: it is none.
        """
        scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.rstrip("/").partition("/")
        if scheme != "s3":
            raise StoreError(f"run.store: got {url!r}, but a store is a directory or s3://bucket/prefix")
        if not _BUCKET.fullmatch(bucket):
            raise StoreError(
                f"run.store: got {url!r}, whose bucket {bucket!r} is no name of a bucket (3 to 63 lower-case letters, "
                "digits, dots and hyphens); write s3://bucket/prefix"
            )
        parts = prefix.split("/") if prefix else []
        if wrong := [part for part in parts if not _PART.fullmatch(part) or not part.strip(".")]:
            raise StoreError(
                f"run.store: got {url!r}, whose prefix has the part {wrong[0]!r}; use letters, digits and -_.=+ "
                "between single slashes"
            )
        return cls(bucket, prefix)

    def connect(self, patience: Patience) -> "ObjectStore":
        """A client for what lies below the prefix; nothing is asked yet.

        Raises:
            StoreError: the library or the credentials are missing.
        """
        if importlib.util.find_spec("obstore") is None:
            raise StoreError(
                f"run.store: {self} needs the package obstore, which is not installed; install the extra s3: "
                'pip install "surgeon[s3]"'
            )
        if not all(map(os.environ.get, _KEYS)) and not any(map(os.environ.get, _ROLES)):
            raise StoreError(
                f"run.store: {self} needs credentials: set {' and '.join(_KEYS)}, or one of {', '.join(_ROLES)} where "
                "the machine has a role"
            )
        from obstore.store import S3Store

        endpoint = _first(_ENDPOINTS)
        config: S3Config = {} if endpoint is None else {"endpoint": endpoint}
        return S3Store(
            self.bucket,
            prefix=self.prefix or None,
            config=config,
            client_options={
                "allow_http": (endpoint or "").startswith("http://"),
                "connect_timeout": timedelta(seconds=patience.connect_s),
                "timeout": timedelta(seconds=patience.request_s),
            },
            retry_config={"max_retries": patience.retries, "retry_timeout": timedelta(seconds=patience.total_s)},
        )

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def surroundings() -> str:
    """What the environment says of buckets, for messages; never a secret."""
    endpoint, region = _first(_ENDPOINTS), _first(_REGIONS)
    known = " and ".join(name for name in (*_KEYS, *_ROLES) if os.environ.get(name))
    where = "not set, which is Amazon's"
    if endpoint:
        parts = urlsplit(endpoint)
        where = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"
    return f"AWS_ENDPOINT_URL is {where}, AWS_REGION is {region or 'not set, which is us-east-1'}, {known} set"


def _first(names: tuple[str, ...]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)
