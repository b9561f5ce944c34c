"""Directories to and from S3, as boto3 (and so the AWS command line) does it by default.

``python -m benchmarks.transfer download|upload SETTINGS URI DIRECTORY``: what somebody has to run before and after
a merge tool that knows files alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from workers.store.uris import split_s3


def bucket_client(settings: Mapping[str, Any]) -> Any:
    """A client of the server that Mergemill's settings name."""
    return boto3.client(
        "s3",
        endpoint_url=settings["s3_endpoint_url"],
        region_name=settings["s3_region"],
        aws_access_key_id=settings["s3_access_key_id"],
        aws_secret_access_key=settings["s3_secret_access_key"],
        config=Config(
            s3={"addressing_style": settings["s3_addressing_style"]},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def upload(settings: Mapping[str, Any], directory: Path, uri: str) -> None:
    """Upload every file of a directory."""
    client = bucket_client(settings)
    bucket, prefix = split_s3(uri)
    for path in sorted(directory.iterdir()):
        client.upload_file(str(path), bucket, f"{prefix}/{path.name}")
    client.close()


def download(settings: Mapping[str, Any], uri: str, directory: Path) -> None:
    """Download every object below a prefix."""
    client = bucket_client(settings)
    bucket, prefix = split_s3(uri)
    directory.mkdir(parents=True)
    for item in client.list_objects_v2(Bucket=bucket, Prefix=prefix + "/")["Contents"]:
        client.download_file(bucket, item["Key"], str(directory / item["Key"].rpartition("/")[2]))
    client.close()


def main(way: str, settings_text: str, uri: str, directory: str) -> None:
    """Do it."""
    settings = json.loads(settings_text)
    if way == "upload":
        upload(settings, Path(directory), uri)
    else:
        download(settings, uri, Path(directory))


if __name__ == "__main__":
    main(*sys.argv[1:])
