"""A job on S3 over three Ray nodes, one of which dies with a part that it has read and not yet uploaded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from service.cluster.driver import Driver
from service.cluster.fleet_process import FleetSettings
from tests.chaos.fault_proxy import FaultProxy
from tests.chaos.faults import Fault, Kind, Request, Script
from tests.checkpoints import fine_tune, llama_tensors, write_checkpoint
from tests.servers.owners import ancestors, owner_of
from tests.servers.ray_cluster import RayCluster
from tests.servers.service import running_service
from workers.store import StoreSettings, join, open_stores
from workers.store.base import ObjectStore
from workers.store.stores import read_bytes

pytestmark = [pytest.mark.valkey, pytest.mark.ray, pytest.mark.rgw]

MIB = 1 << 20
DEADLINE_S = 50.0


def objects(store: ObjectStore, prefix: str) -> dict[str, bytes]:
    """Everything below a prefix."""
    return {info.uri[len(prefix) :]: read_bytes(store, info.uri) for info in store.list(prefix + "/")}


def test_a_node_that_dies_before_it_uploads_a_part(
    valkey_url: str, ray_cluster: RayCluster, rgw_settings: StoreSettings, rgw_bucket: str, tmp_path: Path
) -> None:
    base = llama_tensors(0, layers=4, hidden=256, heads=4, vocab=12_000, dtype=torch.float32)
    write_checkpoint(tmp_path / "base", base, {"torch_dtype": "float32"}, shard_bytes=16 * MIB)
    write_checkpoint(tmp_path / "one", fine_tune(base, 1, 0.01))
    direct = open_stores(rgw_settings)
    for path in (*tmp_path.glob("base/*"), *tmp_path.glob("one/*")):
        direct.put(join(rgw_bucket, *path.relative_to(tmp_path).parts), path.read_bytes())
    recipe: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": f"{rgw_bucket}/base",
        "models": [{"model": f"{rgw_bucket}/one"}],
        "parameters": {"density": 0.5},
    }
    options = {"part_bytes": 5 * MIB, "whole_tensor_bytes": 5 * MIB, "shard_bytes": 20 * MIB}
    assert rgw_settings.s3_endpoint_url is not None
    head, *others = ray_cluster.raylets
    with (
        FaultProxy(rgw_settings.s3_endpoint_url) as proxy,
        Driver(FleetSettings(address=ray_cluster.address)) as driver,
        running_service(
            valkey_url, driver, store=rgw_settings.model_copy(update={"s3_endpoint_url": proxy.url})
        ) as service,
    ):
        undisturbed = service.merge(recipe, f"{rgw_bucket}/undisturbed", **options)
        parts = undisturbed["progress"]["parts_total"]
        assert parts > 6
        assert driver.capacity().nodes == 3
        assert proxy.requests["UploadPart"] == parts

        def is_of_a_node_that_can_die(request: Request) -> bool:
            return request.operation == "UploadPart" and bool(
                {*ancestors(owner_of(request.client))} & {*others}
            )

        proxy.policy = Script([Fault(Kind.HOLD)], is_of_a_node_that_can_die)
        deadline = time.monotonic() + DEADLINE_S
        job = out = ""
        while not proxy.held:
            if not job or service.get(job)["state"] == "succeeded":  # Ray gave the one node all of it
                assert time.monotonic() < deadline, service.get(job)
                out = f"{rgw_bucket}/out-{uuid4().hex}"
                proxy.requests.clear()
                job = service.submit(recipe, out, **options)["id"]
            time.sleep(0.05)
        worker = owner_of(proxy.held[0].client)
        (node,) = {*ancestors(worker)} & {*others}
        ray_cluster.kill_node(node)
        while ancestors(worker):
            assert time.monotonic() < deadline, "the worker is still there"
            time.sleep(0.01)
        proxy.release()
        done = service.wait(job)
        assert done["state"] == "succeeded", done["error"]
        assert (
            driver.retries >= 1
        )  # those that were in the dead worker's stream with it have uploaded nothing yet
        assert proxy.requests["UploadPart"] == parts + 1
        # Some are opened and aborted at once, to see whether the output may be written.
        opened = proxy.requests["CreateMultipartUpload"] - proxy.requests["AbortMultipartUpload"]
        assert opened == proxy.requests["CompleteMultipartUpload"] == 2
        while driver.capacity().nodes != 2:
            assert time.monotonic() < deadline, "the node is still there"
            time.sleep(0.05)
    merged = objects(direct, out)
    assert len([name for name in merged if name.endswith(".safetensors")]) == 2
    assert merged == objects(direct, f"{rgw_bucket}/undisturbed")
    for name in merged:
        assert direct.list_uploads(f"{out}{name}") == []
    assert head in ray_cluster.raylets
