"""Jobs on a real Ceph gateway that misbehaves, or that a proxy before it makes misbehave."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from service.jobs.record import JobRecord, JobState
from service.watching import metrics
from tests.chaos.fault_proxy import FaultProxy
from tests.chaos.faults import Calm, Fault, Kind, Script, Storm
from tests.checkpoints import fine_tune, llama_tensors, write_checkpoint
from tests.e2e.bench import Bench, Steps, at_step
from workers.store import StoreSettings, join
from workers.store.stores import read_bytes

pytestmark = [pytest.mark.valkey, pytest.mark.rgw]

SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
EACH_ONCE = (
    Kind.INTERNAL_ERROR,
    Kind.SLOW_DOWN,
    Kind.RESET,
    Kind.CUT_REQUEST,
    Kind.FLIP_REQUEST,
    Kind.LOSE_ANSWER,
    Kind.ACT_LATE,
    Kind.TRUNCATE,
    Kind.DELAY,
)


@pytest.fixture(scope="module")
def proxy(rgw_settings: StoreSettings) -> Iterator[FaultProxy]:
    with FaultProxy(str(rgw_settings.s3_endpoint_url)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def settings(rgw_settings: StoreSettings, proxy: FaultProxy) -> StoreSettings:
    """The gateway behind the proxy, and little patience between two attempts."""
    changes = {"s3_endpoint_url": proxy.url, "s3_retry_wait_s": 0.001, "s3_retry_wait_max_s": 0.01}
    return rgw_settings.model_copy(update=changes)


@pytest.fixture
def bench(valkey_url: str, settings: StoreSettings, proxy: FaultProxy) -> Iterator[Bench]:
    made = Bench(valkey_url, f"test-{uuid.uuid4().hex}", settings)
    with made.jobs:
        yield made
    proxy.policy = Calm()


@pytest.fixture
def inputs(bench: Bench, rgw_bucket: str, tmp_path: Path) -> dict[str, bytes]:
    """Two small checkpoints in the bucket that merge into two shards."""
    base = llama_tensors(0, layers=1, hidden=48, heads=2, vocab=64, dtype=torch.float32)
    written = {}
    for name, tensors in {"base": base, "one": fine_tune(base, 1, 0.1)}.items():
        path = write_checkpoint(tmp_path / name, tensors) / "model.safetensors"
        written[name] = path.read_bytes()
        bench.store.put(join(rgw_bucket, name, "model.safetensors"), written[name])
    return written


def submit(bench: Bench, bucket: str, out: str) -> str:
    models = [{"model": f"{bucket}/{name}"} for name in ("one", "base")]
    return bench.submit({"merge_method": "linear", "models": models}, f"{bucket}/{out}", shard_bytes=90_000)


def content(bench: Bench, out: str) -> dict[str, bytes]:
    """Everything at an output, after a look for uploads."""
    for shard in SHARDS:
        assert bench.store.list_uploads(join(out, shard)) == []
    return {info.uri[len(out) :]: read_bytes(bench.store, info.uri) for info in bench.store.list(out + "/")}


def detail(record: JobRecord) -> str:
    assert record.error is not None
    return str(record.error["detail"])


def retries() -> float:
    """What the metrics tell about requests that were sent again."""
    (metric,) = metrics.STORE_RETRIES.collect()
    return sum(sample.value for sample in metric.samples)


def test_faults_of_every_kind_at_every_request_change_nothing(
    bench: Bench, inputs: dict[str, bytes], rgw_bucket: str, proxy: FaultProxy
) -> None:
    """Each request fails once, or is flipped, delayed, cut or acted on unseen; the next one gets through."""
    assert bench.run(submit(bench, rgw_bucket, "calm")).state == JobState.SUCCEEDED
    undisturbed = content(bench, f"{rgw_bucket}/calm")
    storms = {
        "mixed": Storm(48, dict.fromkeys(EACH_ONCE, 0.15), (0.0, 0.1), in_a_row=1),
        "lost": Storm(0, {Kind.LOSE_ANSWER: 1.0}, in_a_row=1),
    }
    injected = {}
    for out, storm in storms.items():
        proxy.policy, before = storm, proxy.injected.copy()
        counted = retries()
        record = bench.run(submit(bench, rgw_bucket, out))
        proxy.policy = Calm()
        assert record.state == JobState.SUCCEEDED, record.error
        assert len(bench.jobs.parts(record.id)) == record.parts_total == 2
        assert content(bench, f"{rgw_bucket}/{out}") == undisturbed
        injected[out] = proxy.injected - before
        assert injected[out].total() > 30
    assert set(injected["mixed"]) == set(EACH_ONCE)
    assert retries() - counted == injected["lost"].total()


def test_credentials_that_run_out_fail_the_job_at_once_and_the_next_one_clears_up(
    bench: Bench, inputs: dict[str, bytes], rgw_bucket: str, proxy: FaultProxy
) -> None:
    out = f"{rgw_bucket}/out"

    def expire() -> None:
        proxy.policy = Storm(0, {Kind.EXPIRED_TOKEN: 1.0}, in_a_row=1 << 30)

    job = submit(bench, rgw_bucket, "out")
    record = bench.run(job, at_step("apply uploads_opened", expire, "after"))
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert record.error["type"] == "AccessDeniedError"
    assert "ExpiredToken" in detail(record)
    assert "renew them where the service runs" in detail(record)
    assert "could not be cleaned up" in detail(record)
    assert proxy.injected[Kind.EXPIRED_TOKEN] < 10
    proxy.policy = Calm()
    assert all("/.mergemill/" in info.uri for info in bench.store.list(out + "/"))
    assert bench.run(submit(bench, rgw_bucket, "out")).state == JobState.SUCCEEDED
    assert not [name for name in content(bench, out) if "mergemill/" in name]


def test_an_upload_that_is_flipped_every_time_fails_the_job_and_nothing_of_it_is_seen(
    bench: Bench, inputs: dict[str, bytes], rgw_bucket: str, proxy: FaultProxy
) -> None:
    proxy.policy = Script(
        [Fault(Kind.FLIP_REQUEST)] * 1000, lambda request: request.operation == "UploadPart"
    )
    record = bench.run(submit(bench, rgw_bucket, "out"))
    proxy.policy = Calm()
    assert record.state == JobState.FAILED
    assert "XAmzContentSHA256Mismatch" in detail(record)
    assert "sent 8 times" in detail(record)
    assert content(bench, f"{rgw_bucket}/out") == {}


def test_an_input_that_is_overwritten_after_planning_fails_the_job_by_name(
    bench: Bench, inputs: dict[str, bytes], rgw_bucket: str
) -> None:
    changed = join(rgw_bucket, "one", "model.safetensors")

    def overwrite() -> None:
        bench.store.put(changed, inputs["base"])

    record = bench.run(submit(bench, rgw_bucket, "out"), at_step("apply uploads_opened", overwrite))
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert record.error["type"] == "ObjectChangedError"
    assert changed in detail(record)
    assert content(bench, f"{rgw_bucket}/out") == {}


class TestFlippedReads:
    """The bit that flips lies in the weights of one input, on their way to the part that merges them."""

    @staticmethod
    def flips(name: str, times: int) -> Script:
        """Flip reads of a model's weights, but for its header's."""
        return Script(
            [Fault(Kind.FLIP, at=0.7, bit=6)] * times,
            lambda request: (request.method, request.key[: len(name) + 7]) == ("GET", f"{name}/model-"),
        )

    @pytest.fixture
    def made(self, bench: Bench, inputs: dict[str, bytes], rgw_bucket: str) -> str:
        """The name of a model that Mergemill made."""
        assert bench.run(submit(bench, rgw_bucket, "made")).state == JobState.SUCCEEDED
        return "made"

    def run(self, bench: Bench, bucket: str, proxy: FaultProxy, name: str, out: str, times: int) -> JobRecord:
        """Merge a model with the base while its first reads are flipped."""
        models = [{"model": f"{bucket}/{each}"} for each in (name, "base")]
        recipe = {"merge_method": "linear", "models": models}
        job = bench.submit(recipe, f"{bucket}/{out}", shard_bytes=90_000)

        def begin() -> None:
            proxy.policy = self.flips(name, times)

        record = bench.run(job, at_step("apply uploads_opened", begin, "after"))
        proxy.policy = Calm()
        return record

    def test_of_our_own_making_they_are_read_again(
        self, bench: Bench, made: str, rgw_bucket: str, proxy: FaultProxy
    ) -> None:
        assert self.run(bench, rgw_bucket, proxy, made, "calm", 0).state == JobState.SUCCEEDED
        undisturbed = content(bench, f"{rgw_bucket}/calm")
        flipped, counted = proxy.injected[Kind.FLIP], retries()
        record = self.run(bench, rgw_bucket, proxy, made, "out", 1)
        assert record.state == JobState.SUCCEEDED, record.error
        assert (proxy.injected[Kind.FLIP] - flipped, retries() - counted) == (1, 1)
        assert content(bench, f"{rgw_bucket}/out") == undisturbed

    def test_of_our_own_making_and_flipped_every_time_they_fail_the_job_by_name(
        self, bench: Bench, made: str, rgw_bucket: str, proxy: FaultProxy
    ) -> None:
        record = self.run(bench, rgw_bucket, proxy, made, "out", 1000)
        assert record.state == JobState.FAILED
        assert record.error is not None
        assert record.error["type"] == "CorruptReadError"
        assert f"{rgw_bucket}/made/model-0000" in detail(record)
        assert content(bench, f"{rgw_bucket}/out") == {}

    def test_of_what_somebody_else_has_written_since_nothing_is_known(
        self, bench: Bench, made: str, rgw_bucket: str, proxy: FaultProxy
    ) -> None:
        """Nor of any other model: the flipped bit is in the output. TLS is the protection, and the guide says so."""
        for shard in SHARDS:
            uri = join(rgw_bucket, made, shard)
            bench.store.put(uri, read_bytes(bench.store, uri))
        assert self.run(bench, rgw_bucket, proxy, made, "calm", 0).state == JobState.SUCCEEDED
        record = self.run(bench, rgw_bucket, proxy, made, "out", 1)
        assert record.state == JobState.SUCCEEDED
        calm, out = (content(bench, f"{rgw_bucket}/{name}") for name in ("calm", "out"))
        assert calm.keys() == out.keys()
        assert {name for name in calm if calm[name] != out[name]} & {f"/{shard}" for shard in SHARDS}


def test_of_two_deployments_that_claim_one_output_at_once_one_fails_before_it_writes(
    bench: Bench, inputs: dict[str, bytes], rgw_bucket: str, valkey_url: str
) -> None:
    """They share no Redis: only the conditional put is between them."""
    out = f"{rgw_bucket}/out"
    meet, records = threading.Barrier(2, timeout=30), {}
    with ExitStack() as stack:
        benches = [bench, Bench(valkey_url, f"test-{uuid.uuid4().hex}", bench.settings.store)]
        stack.enter_context(benches[1].jobs)
        steps = [Steps(), Steps()]

        def run(number: int) -> None:
            def hook(_: int, moment: str, name: str) -> None:
                if (moment, name) == ("before", "put_if_absent claim.json"):
                    meet.wait()
                if (moment, name) == ("after", "put progress.json"):
                    lost.wait(30)

            steps[number] = Steps(hook)
            mine = benches[number]
            records[number] = mine.run(submit(mine, rgw_bucket, "out"), steps[number])
            lost.set()  # the one that fails is first to end: the other holds its claim until then

        lost = threading.Event()
        threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    states = [records[number].state for number in (0, 1)]
    assert sorted(states) == [JobState.FAILED, JobState.SUCCEEDED]
    loser = states.index(JobState.FAILED)
    assert records[1 - loser].id in detail(records[loser])
    assert not [name for name in steps[loser].names if name.startswith(("open_upload", "put ", "delete"))]
    assert len(content(bench, out)) == 5
