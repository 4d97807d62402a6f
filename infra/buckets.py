"""Buckets on an S3-compatible server, made where they are not there yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from infra.local.settings import StackError


def make_buckets(names: Iterable[str], environ: Mapping[str, str]) -> list[str]:
    """The buckets that were made. `environ` has the server's address and keys, as AWS names them.

    Raises StackError where the server does not answer or refuses.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    address = environ.get("AWS_ENDPOINT_URL")
    try:
        client = boto3.client(
            "s3",
            endpoint_url=address,
            aws_access_key_id=environ.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=environ.get("AWS_SECRET_ACCESS_KEY"),
            region_name=environ.get("AWS_DEFAULT_REGION"),
        )
        known = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        new = [name for name in names if name not in known]
        for name in new:
            client.create_bucket(Bucket=name)
    except (BotoCoreError, ClientError) as error:
        raise StackError(f"S3 at {address or 'AWS'}: {error}") from error
    return new
