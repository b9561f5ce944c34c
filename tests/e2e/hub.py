"""Models by their hub names, in a directory or in S3, and recipes that are posted to a service as they are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.cluster.driver import Driver
from tests.servers.service import RunningService, running_service
from workers.store import Stores, StoreSettings, join, open_stores
from workers.store.stores import read_bytes


def upload(store: Stores, models: Path, uri: str) -> None:
    """Put all files below a directory below a URI."""
    for path in models.rglob("*.*"):
        if path.is_file():
            store.put(join(uri, *path.relative_to(models).parts), path.read_bytes())


def download(store: Stores, uri: str, directory: Path) -> Path:
    """Get a checkpoint, or an adapter, into a new directory. Nothing lies beside it but Mergemill's own."""
    directory.mkdir(parents=True)
    for info in store.list(f"{uri}/", beside=True):
        (directory / info.uri.rpartition("/")[2]).write_bytes(read_bytes(store, info.uri))
    return directory


def merged_in_directories(
    driver: Driver, redis_url: str, models: Path, recipes: Mapping[str, str], root: Path
) -> dict[str, Path]:
    """What a service makes of recipes whose models lie below a directory, by their names."""
    outs = {name: root / name for name in recipes}
    with running_service(redis_url, driver, model_roots={"": models.as_uri()}) as service:
        merge_all(service, recipes, {name: str(out) for name, out in outs.items()})
    return outs


def merged_on_s3(
    driver: Driver,
    redis_url: str,
    models: Path,
    recipes: Mapping[str, str],
    root: Path,
    settings: StoreSettings,
    bucket: str,
) -> dict[str, Path]:
    """The same with models and outputs in S3; the outputs are downloaded below ``root``."""
    store = open_stores(settings)
    upload(store, models, f"{bucket}/hub")
    outs = {name: f"{bucket}/out/{name}" for name in recipes}
    roots = {"": f"{bucket}/hub"}
    with running_service(redis_url, driver, store=settings, model_roots=roots) as service:
        merge_all(service, recipes, outs)
    return {name: download(store, out, root / name) for name, out in outs.items()}


def merge_all(
    service: RunningService, recipes: Mapping[str, str], outs: Mapping[str, str], **options: Any
) -> None:
    """Post every recipe, all at once, and wait until they are merged."""
    jobs = []
    for name, out in outs.items():
        answer = service.http.post(
            "/v1/merges",
            params={"output": out, **options},
            content=recipes[name],
            headers={"content-type": "application/yaml"},
        )
        assert answer.status_code == 202, answer.text
        jobs.append(answer.json()["id"])
    for job in jobs:
        done = service.wait(job)
        assert done["state"] == "succeeded", done["error"]
