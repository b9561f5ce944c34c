"""Whatever comes in, nothing breaks: no input of any route gives a 5xx, and every refusal is a declared problem."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch
import yaml
from hypothesis import event, example, given
from hypothesis import strategies as st

from api.app import create_app
from api.bodies import YAML_TYPES
from api.schemas import Problem
from service.jobs.jobstore import JobStore
from service.jobs.record import JobState
from service.jobs.transitions import CommitStarted, Succeeded
from service.settings import Settings
from tests.api.conftest import serving
from tests.api.test_routes import record
from tests.checkpoints import write_checkpoint
from tests.fuzzing import fuzzed
from tests.servers.keys import bearer, make_key
from tests.service.job_steps import ALL_COMPLETE, TO_RUNNING
from workers.methods import METHODS

pytestmark = pytest.mark.valkey

bounded = fuzzed(150)


class World:
    """An API, what its document says, and jobs and directories that requests may hit."""

    def __init__(self, http: httpx.Client, jobs: list[str], place: Path) -> None:
        self.http = http
        self.jobs = jobs
        self.place = place
        self.paths: dict[str, Any] = http.get("/openapi.json").json()["paths"]

    def check(self, method: str, template: str, answer: httpx.Response) -> None:
        """The answer is none of a broken service, and what the document says of it."""
        event(f"{method} {template}: {answer.status_code}")
        assert answer.status_code < 500, answer.text
        operation = self.paths[template]["get" if method == "HEAD" else method.lower()]
        assert str(answer.status_code) in operation["responses"], (answer.status_code, answer.text)
        if answer.status_code >= 400 and answer.status_code != 416:
            assert answer.headers["content-type"] == "application/problem+json"
            if method != "HEAD":
                problem = Problem.model_validate(answer.json())
                assert problem.status == answer.status_code
                assert problem.type.startswith("urn:mergemill:error:")


@pytest.fixture(scope="module")
def world(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A service with a finished and a running job, a good model, and one that nothing can be made of."""
    place = tmp_path_factory.mktemp("world")
    write_checkpoint(place / "good", {"a": torch.zeros(4), "b": torch.ones(2, 2)})
    (place / "bad").mkdir()
    (place / "bad" / "model.safetensors").write_bytes(b"\xff" * 20)
    (place / "odd").mkdir()
    Path(os.fsdecode(os.fsencode(place / "odd") + b"/\xff.bin")).touch()
    (place / "file").touch()
    (place / "good" / "config.json").write_text("{}")
    namespace = f"test-{place.name}-{os.getpid()}"
    app = create_app(Settings(redis_url=valkey_url, namespace=namespace))
    with JobStore(valkey_url, namespace) as jobs, serving(app) as http:
        http.headers.update(bearer(make_key(valkey_url, namespace)))
        files = [{"name": "config.json", "size": 2, "digest": "sha256:x"}]
        done = (*TO_RUNNING, CommitStarted(), *ALL_COMPLETE, Succeeded({"files": files}))
        ids = [
            record(jobs, *events, output=(place / "good").as_uri()).id for events in ((), TO_RUNNING, done)
        ]
        yield World(http, ids, place)


# --- what comes in ----------------------------------------------------------------------------------------

names = st.sampled_from(
    ["good", "bad", "odd", "file", "none", "good/config.json", "a" * 300, "%ff", "\u2028"]
)
"""Models, by their names in the world; whole paths are made of them, since `/` would be searched through."""

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**300, 10**310), st.floats(), st.text(max_size=20)
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
parameters = junk | st.dictionaries(
    st.sampled_from(["weight", "density", "lambda", "normalize", "t", "profile", "rescale", "epsilon"]), junk
)
models = st.lists(
    st.fixed_dictionaries({"model": names.map("<{}>".format) | st.text(max_size=12)},
                          optional={"parameters": parameters}), max_size=4,
)  # fmt: skip
recipes = junk | st.fixed_dictionaries(
    {"merge_method": st.sampled_from([*METHODS]) | junk, "models": models | junk},
    optional={
        "base_model": names.map("<{}>".format) | junk,
        "parameters": parameters,
        **dict.fromkeys(("dtype", "out_dtype", "tokenizer_source", "profile", "seed", "buffers", "slices"), junk),
        **dict.fromkeys(("missing_tensors", "extra_tensors", "mismatched_tensors", "x"), junk),
    },
)  # fmt: skip
options = st.dictionaries(st.sampled_from(["shard_bytes", "part_bytes", "overwrite", "x"]), scalars) | junk
nearly = st.fixed_dictionaries(
    {"merge_method": st.just("linear"), "models": st.lists(
        st.fixed_dictionaries({"model": st.just("<good>") | names.map("<{}>".format)},
                              optional={"parameters": st.fixed_dictionaries({"weight": scalars})}),
        min_size=2, max_size=3)}
)  # fmt: skip
requests = junk | st.fixed_dictionaries(
    {"recipe": nearly | recipes, "output": names.map("<out/{}>".format) | junk},
    optional={"options": options | st.just({}), "x": junk},
) | st.fixed_dictionaries({"recipe": nearly, "output": names.map("<out/{}>".format)})  # fmt: skip
queries = st.dictionaries(
    st.sampled_from(["output", "overwrite", "part_bytes", "shard_bytes", "limit", "cursor", "state", "x"]),
    st.text(max_size=20) | st.integers().map(str) | st.sampled_from([*JobState, "true", "/o", "s3://b/o", "bWVyZ2U"]),
    max_size=3,
)  # fmt: skip
TYPES = ("application/json", *YAML_TYPES, "application/json; charset=utf-16", "text/xml", "\xff", "")


def located(world: World, value: Any) -> Any:
    """The value with every `<name>` as a path in the world; other absolute paths lead nowhere."""
    if isinstance(value, str):
        if value.startswith("<") and value.endswith(">"):
            return str(world.place / value[1:-1])
        return value.replace("/", "÷").replace("s3:", "s3÷")
    if isinstance(value, list):
        return [located(world, item) for item in value]
    if isinstance(value, dict):
        return {key: located(world, item) for key, item in value.items()}
    return value


def post(world: World, route: str, query: dict[str, str], kind: str, data: bytes) -> httpx.Response:
    """Post a body, whatever it is."""
    headers = {"content-type": kind.encode("latin-1")}
    return world.http.post(route, params=query, content=data, headers=headers)  # type: ignore[arg-type]


def step(text: str) -> str:
    """The text as one step of a path: neither two, nor one up."""
    return quote(text.replace("/", "÷").replace(".", "·"), safe="")


# --- properties -------------------------------------------------------------------------------------------


@bounded
@given(
    st.sampled_from(["/v1/merges", "/v1/plans"]),
    requests,
    st.booleans(),
    queries | st.just({"output": "/nowhere"}) | st.just({}),
)
@example("/v1/plans", {"recipe": {"merge_method": "linear", "models": [{"model": "<odd>"}] * 2}}, False, {})
@example("/v1/plans", {"recipe": {"merge_method": "linear", "models": [{"model": "<good>"}] * 2}}, True, {})
def test_recipes(world: World, route: str, body: Any, as_yaml: bool, query: dict[str, str]) -> None:
    body = located(world, body)
    if as_yaml:
        recipe = body.get("recipe") if isinstance(body, dict) else body
        data = yaml.safe_dump(recipe, allow_unicode=True).encode()
        answer = post(world, route, query, "application/yaml", data)
    else:
        answer = post(world, route, {}, "application/json", json.dumps(body).encode())
    world.check("POST", route, answer)


@bounded
@given(
    st.sampled_from(["/v1/merges", "/v1/plans"]),
    queries,
    st.sampled_from(TYPES),
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.replace("/", "÷").encode())
    | st.text("{}[]:,-&*!<|>?%@`'\"#\n\t ~01e.\\uxX_ab=", max_size=60).map(str.encode),
)
@example("/v1/plans", {}, "text/yaml", b"? [a]\n: b")
@example("/v1/plans", {}, "text/yaml", b"{models: 2001-01-01, merge_method: !!binary aGk=, x: !!set {a}}")
@example(
    "/v1/plans", {}, "text/yaml", b"merge_method: linear\nseed: 0x" + b"F" * 5000 + b"\nmodels: [{model: x}]"
)
@example(
    "/v1/plans",
    {},
    "text/yaml",
    b"merge_method: linear\nmodels: [{model: x, parameters: {weight: 0x" + b"F" * 5000 + b"}}]",
)
@example("/v1/plans", {}, "text/yaml", b'merge_method: "\\uD800"\nmodels: [{model: x}]')
@example("/v1/plans", {}, "text/yaml", b"&a [*a]")
@example("/v1/plans", {}, "text/yaml", b"merge_method: linear\nmodels: &m [{model: x, parameters: {w: *m}}]")
@example(
    "/v1/merges",
    {},
    "application/json",
    b'{"recipe": {"merge_method": "linear", "seed": 1' + b"0" * 5000 + b"}}",
)
@example("/v1/merges", {}, "application/json", b'{"recipe":' + b'{"a":' * 5000 + b"1" + b"}" * 5001)
def test_bodies(world: World, route: str, query: dict[str, str], kind: str, data: bytes) -> None:
    world.check("POST", route, post(world, route, query, kind, data))


@bounded
@given(
    st.sampled_from(["GET", "HEAD"]),
    st.sampled_from(["/v1/merges", "/v1/merges/{job}", "/v1/merges/{job}/files", "/v1/merges/{job}/files/{name}",
                     "/v1/methods", "/healthz", "/readyz"]),
    st.integers(0, 2) | st.text(min_size=1, max_size=30),
    st.just("config.json") | st.text(min_size=1, max_size=30),
    queries,
)  # fmt: skip
def test_reading(
    world: World, method: str, template: str, job: int | str, name: str, query: dict[str, str]
) -> None:
    known = world.jobs[job] if isinstance(job, int) else step(job)
    path = template.replace("{job}", known).replace("{name}", name if name == "config.json" else step(name))
    world.check(method, template, world.http.request(method, path, params=query))


@bounded
@given(st.integers(0, 2) | st.text(min_size=1, max_size=30), st.binary(max_size=30))
def test_cancelling(world: World, job: int | str, body: bytes) -> None:
    known = world.jobs[job] if isinstance(job, int) else step(job)
    answer = world.http.post(f"/v1/merges/{known}/cancel", content=body)
    world.check("POST", "/v1/merges/{job}/cancel", answer)
    expected: dict[int | str, int] = {0: 202, 1: 202, 2: 409}
    assert answer.status_code == expected.get(job, 404)
