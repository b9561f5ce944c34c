"""What somebody else's bucket does not let us do is said before anything is made, on a real gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from service.cluster.driver import Driver
from tests.checkpoints import fine_tune, llama_tensors, write_checkpoint
from tests.servers.rgw_fixtures import client_of, make_bucket
from tests.servers.service import RunningService, running_service
from workers.store import StoreSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = [pytest.mark.valkey, pytest.mark.ray, pytest.mark.rgw]

CODE = "answered 403"
"""How the store's own word is quoted."""


@pytest.fixture
def stranger(rgw_stranger: StoreSettings) -> Iterator[S3Client]:
    """The other user, at work."""
    with client_of(rgw_stranger) as client:
        yield client


@pytest.fixture
def secret(rgw_stranger: StoreSettings) -> str:
    """His bucket that we may not even list."""
    return make_bucket(rgw_stranger)


@pytest.fixture
def shown(rgw_stranger: StoreSettings, stranger: S3Client) -> str:
    """His bucket that we may list and read, but not write to."""
    bucket = make_bucket(rgw_stranger)
    allowed = {
        "Effect": "Allow",
        "Principal": {"AWS": ["arn:aws:iam:::user/mergemill"]},
        "Action": ["s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:GetObject"],
        "Resource": [f"arn:aws:s3:::{bucket[5:]}", f"arn:aws:s3:::{bucket[5:]}/*"],
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    stranger.put_bucket_policy(Bucket=bucket[5:], Policy=policy)
    return bucket


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """A small base."""
    return llama_tensors(0, layers=1, hidden=32, heads=2, vocab=64, dtype=torch.float32)


@pytest.fixture
def service(valkey_url: str, driver: Driver, rgw_settings: StoreSettings) -> Iterator[RunningService]:
    """A service with our keys."""
    with running_service(valkey_url, driver, store=rgw_settings) as running:
        yield running


def give(client: S3Client, bucket: str, name: str, tensors: dict[str, torch.Tensor], place: Path) -> str:
    """Put a model into a bucket; its URI."""
    path = write_checkpoint(place / name, tensors) / "model.safetensors"
    client.put_object(Bucket=bucket[5:], Key=f"{name}/model.safetensors", Body=path.read_bytes())
    return f"{bucket}/{name}"


def held(client: S3Client, bucket: str) -> list[str]:
    """Every object of a bucket, and every open upload."""
    objects = client.list_objects_v2(Bucket=bucket[5:]).get("Contents", [])
    uploads = client.list_multipart_uploads(Bucket=bucket[5:]).get("Uploads", [])
    return [each["Key"] for each in objects] + [f"upload of {each['Key']}" for each in uploads]


def said_of(problems: list[str], *words: str) -> list[str]:
    return [problem for problem in problems if all(word in problem for word in words)]


def test_everything_that_is_forbidden_is_said_together_with_what_else_is_wrong(
    service: RunningService,
    stranger: S3Client,
    secret: str,
    shown: str,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    name = "model.norm.weight"
    base = give(stranger, shown, "base", tensors, tmp_path)
    hidden = give(stranger, secret, "hidden", fine_tune(tensors, 1, 0.1), tmp_path)
    odd = give(stranger, shown, "odd", fine_tune(tensors, 2, 0.1) | {name: torch.zeros(3)}, tmp_path)
    before = held(stranger, secret), held(stranger, shown)
    recipe = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": model} for model in (hidden, odd, f"{shown}/absent")],
    }
    output = f"{shown}/out"
    told = service.failure(recipe, output, worker_memory_bytes=64 << 20).split("\n")
    answer = service.http.post(
        "/v1/plans",
        json={"recipe": recipe, "output": output, "options": {"worker_memory_bytes": 64 << 20}},
    )
    assert answer.status_code == 422
    assert answer.json()["errors"] == told
    assert len(told) == 5
    assert len(said_of(told, f"{hidden}: ", CODE, "policy")) == 1
    assert len(said_of(told, f"output {output}: cannot open an upload", CODE, "policy")) == 1
    assert len(said_of(told, odd, name, "shape differs")) == 1
    assert len(said_of(told, f"{shown}/absent: no model here")) == 1
    assert len(said_of(told, "raise it to at least")) == 1
    assert (held(stranger, secret), held(stranger, shown)) == before


def test_a_wrong_recipe_does_not_hide_that_the_output_may_not_be_looked_at(
    service: RunningService,
    stranger: S3Client,
    secret: str,
    shown: str,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    base = give(stranger, shown, "base", tensors, tmp_path)
    recipe = {"merge_method": "linear", "models": [{"model": base}], "parameters": {"wieght": 1}}
    for route in ("/v1/merges", "/v1/plans"):
        answer = service.http.post(route, json={"recipe": recipe, "output": f"{secret}/out"})
        assert answer.status_code == 422
        first, second = answer.json()["errors"]
        assert "parameters.wieght" in first
        assert said_of([second], f"output {secret}/out: ", CODE, "policy")
    assert held(stranger, secret) == []


def test_what_may_be_read_is_merged_to_where_may_be_written(
    service: RunningService,
    stranger: S3Client,
    shown: str,
    rgw_bucket: str,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    """The bucket that the other tests are refused is refused for what it does not allow, not altogether."""
    models = [give(stranger, shown, f"m{seed}", fine_tune(tensors, seed, 0.1), tmp_path) for seed in (1, 2)]
    recipe = {"merge_method": "linear", "models": [{"model": model} for model in models]}
    done = service.merge(recipe, f"{rgw_bucket}/out")
    assert done["progress"]["bytes_done"] > 0
