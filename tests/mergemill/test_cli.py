"""The command line: what it parses, refuses, prints and exits with, the service behind it played by a transport."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from annotated_types import Ge, Le
from typer.testing import CliRunner, Result

from mergemill import Client, cli, keys, session
from mergemill.arguments import BOUNDS
from mergemill.stack import FILE_ROOTS, child_environment
from service.planning.plan import PlanOptions
from service.settings import Settings
from tests.checkpoints import write_checkpoint
from workers.methods import METHODS

pytestmark = pytest.mark.fast

JOB = "merge-00000000000000000000000000"
URL = "http://service.test"
MIB = 1 << 20


class Service:
    """Answers in order of the states given, and remembers what it was asked."""

    def __init__(self) -> None:
        self.states = ["queued", "planning", "running", "committing", "succeeded"]
        self.error: dict[str, Any] | None = None
        self.refusal: tuple[int, dict[str, Any]] | None = None
        self.asked: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.method, request.url.path))
        if "Idempotency-Key" in request.headers:
            self.keys.append(request.headers["Idempotency-Key"])
        if request.content:
            self.bodies.append(json.loads(request.content))
        refusal = (404, {}) if request.url.path.endswith("/events") else self.refusal
        if refusal is not None:
            return httpx.Response(refusal[0], json=refusal[1])
        if request.url.path == "/v1/plans":
            return httpx.Response(200, json={"digest": "d"})
        if request.method == "GET" and request.url.path == "/v1/merges":
            return httpx.Response(200, json={"jobs": [self.job("failed")], "next_cursor": None})
        if request.url.path.endswith("/cancel"):
            self.states = ["running", "cancelled"]
            return httpx.Response(202, json=self.job("running"))
        if request.method in {"POST", "DELETE"}:
            status = 202 if request.method == "POST" else 204
            return httpx.Response(status, json=self.job(self.states[0]))
        return httpx.Response(
            200, json=self.job(self.states.pop(0) if len(self.states) > 1 else self.states[0])
        )

    def job(self, state: str) -> dict[str, Any]:
        done = {"committing": 3000, "succeeded": 3000, "running": 1000}.get(state, 0)
        at = "2026-01-02T03:04:05Z"
        return {
            "id": JOB, "state": state, "output": "s3://bucket/out", "created_at": at, "updated_at": at,
            "cancel_requested": False, "error": self.error, "recipe": {"merge_method": "ties"},
            "notices": ["a notice"], "price": None,
            "progress": {"bytes_done": done, "bytes_total": 3000 if done else 0, "parts_done": 1, "parts_total": 3},
        }  # fmt: skip


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    found = Service()
    transport = httpx.MockTransport(found.handle)
    monkeypatch.setattr(session, "open_client", lambda url, api_key=None: Client(url, transport=transport))
    monkeypatch.setattr("mergemill.client.POLL_S", (0.001, 0.001))
    return found


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the current directory, with two small models beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MERGEMILL_URL", raising=False)
    for number, name in enumerate(("a", "b")):
        write_checkpoint(tmp_path / "models" / name, {"w": torch.full((4,), float(number))})
    path = tmp_path / "recipe.yml"
    path.write_text("merge_method: linear\nmodels:\n  - model: models/a\n  - model: ./models/b\n")
    return path


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env=env)


def test_every_command_has_help() -> None:
    assert run("--version").stdout == f"mergemill {version('mergemill')}\n"
    commands = [each.name or each.callback.__name__ for each in cli.app.registered_commands if each.callback]
    assert len(commands) > 12
    for command in [*commands, "keys"]:
        found = run(command, "--help")
        assert found.exit_code == 0
        assert found.stdout.strip()


def test_the_readme_names_every_command() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert f"`mergemill {command.name or command.callback.__name__}" in readme
    (row,) = re.findall(r"^\| `mergemill keys .*\|$", readme, re.M)
    for command in keys.app.registered_commands:
        assert command.callback is not None
        assert f"{command.name or command.callback.__name__}`" in row


def test_the_readme_names_every_method_and_no_parameter_that_a_method_lacks() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \| [^|]* \| [^|]* \| ([^|]*) \|$", readme, re.M)
    told = [(name, parameters) for names, parameters in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted(name for name, _ in told) == sorted(METHODS)
    for name, parameters in told:
        method = METHODS[name]
        kinds = (method.parameters, method.model_parameters)
        known = {given.alias or own for kind in kinds for own, given in kind.model_fields.items()}
        assert {*re.findall(r"`(\w+)`", parameters)} <= known, name


@pytest.mark.parametrize(
    "arguments",
    [
        ["melt"],
        ["merge"],
        ["merge", "none.yml", "out"],
        ["merge", "recipe.yml"],
        ["merge", "recipe.yml", "out", "--shard-size", "5 gigs"],
        ["merge", "recipe.yml", "out", "--shard-size", "0"],
        ["merge", "models", "out"],
        ["up", "--port", "65536"],
        ["status"],
        ["list", "--limit", "0"],
    ],
)
def test_wrong_usage_is_status_2(recipe: Path, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("option", "size", "said"),
    [
        ("--part-size", "1MiB", "1MiB is less than the minimum, 5MiB"),
        ("--part-size", "5GiB", "5GiB is more than the maximum, 4GiB"),
        ("--shard-size", "6TiB", "6TiB is more than the maximum, 5TiB"),
        ("--worker-memory", "x", "'x' is not a size"),
    ],
)
def test_a_size_out_of_bounds_names_its_option(recipe: Path, option: str, size: str, said: str) -> None:
    found = run("plan", recipe, option, size)
    assert found.exit_code == 2
    told = " ".join(found.stderr.replace("│", " ").split())
    assert option in told and said in told


def test_the_bounds_are_the_services() -> None:
    assert {*BOUNDS} == {name for name in PlanOptions.model_fields if name in BOUNDS}
    for name, bounds in BOUNDS.items():
        limits = {type(limit): limit for limit in PlanOptions.model_fields[name].metadata}
        least, most = limits[Ge].ge, limits[Le].le if Le in limits else None
        assert bounds == (least, most), name


def test_submit_sends_uris_and_bytes(recipe: Path, service: Service) -> None:
    options = [
        "--overwrite",
        "--priority",
        "-3",
        "--shard-size",
        "5GB",
        "--part-size",
        "64MiB",
        "--worker-memory",
        "2 GiB",
    ]
    found = run("submit", recipe, "./out", "--url", URL, *options)
    assert (found.exit_code, found.stdout) == (0, f"{JOB}\n")
    (body,) = service.bodies
    assert body["priority"] == -3
    assert body["output"] == (recipe.parent / "out").as_uri()
    assert [entry["model"] for entry in body["recipe"]["models"]] == [
        (recipe.parent / "models" / name).as_uri() for name in "ab"
    ]
    assert body["options"] == {
        "overwrite": True, "shard_bytes": 5 * 10**9, "part_bytes": 64 * MIB, "worker_memory_bytes": 2048 * MIB
    }  # fmt: skip


def test_the_idempotency_key_can_be_chosen(recipe: Path, service: Service) -> None:
    for command in ("submit", "merge"):
        assert run(command, recipe, "./out", "--url", URL, "--idempotency-key", "mine").exit_code == 0
        assert run(command, recipe, "./out", "--url", URL).exit_code == 0
    assert service.keys[::2] == ["mine", "mine"]
    assert len(set(service.keys)) == 3


def test_merge_waits_and_prints_plain_lines(recipe: Path, service: Service) -> None:
    found = run("merge", recipe, "s3://bucket/out", env={"MERGEMILL_URL": URL})
    assert found.exit_code == 0
    assert found.stdout == f"{JOB} succeeded: 3.00 kB at s3://bucket/out\n"
    assert found.stderr.splitlines() == [
        *(f"{JOB} {state}" for state in ("queued", "planning", "running", "committing", "succeeded")),
        "note: a notice",
    ]


def test_merge_prints_json_alone(recipe: Path, service: Service) -> None:
    found = run("merge", recipe, "s3://bucket/out", "--url", URL, "--json")
    assert json.loads(found.stdout)["state"] == "succeeded"


def test_a_failed_merge_lists_every_problem(recipe: Path, service: Service) -> None:
    service.states = ["failed"]
    service.error = {
        "type": "PlanError",
        "detail": "one; two",
        "problems": ["one [brackets]", "two " + "long " * 40],
    }
    found = run("merge", recipe, "s3://bucket/out", "--url", URL)
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr.splitlines()[-3:] == [
        "error: 2 problems:",
        "  - one [brackets]",
        "  - two " + "long " * 40,
    ]


def test_a_job_that_fails_for_one_reason_says_it(recipe: Path, service: Service) -> None:
    service.states = ["failed"]
    service.error = {"type": "NonFiniteError", "detail": "3 NaN in w of a"}
    found = run("watch", JOB, "--url", URL)
    assert found.exit_code == 1
    assert found.stderr.splitlines()[-1] == f"error: {JOB} failed: 3 NaN in w of a"


def test_an_unknown_name_is_said_to_be_no_directory_either(recipe: Path, service: Service) -> None:
    recipe.write_text("merge_method: linear\nmodels: [{model: org/one}, {model: models/a}]\n")
    problem = "'org/one' is a hub name that this service does not know"
    service.refusal = (422, {"detail": problem, "type": "urn:mergemill:error:plan", "errors": [problem]})
    for command in ("submit", "merge", "plan"):
        found = run(command, recipe, "s3://bucket/out", "--url", URL)
        assert found.exit_code == 1
        assert found.stderr.splitlines() == [
            "error: 2 problems:", f"  - {problem}", f"  - there is no directory 'org/one' in {recipe.parent} either"
        ]  # fmt: skip


def test_ctrl_c_cancels_and_waits(recipe: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    handle: Callable[[httpx.Request], httpx.Response] = service.handle
    looks = iter(range(100))

    def interrupted(request: httpx.Request) -> httpx.Response:
        if request.method == "GET" and next(looks) == 2:
            raise KeyboardInterrupt
        return handle(request)

    monkeypatch.setattr(
        session,
        "open_client",
        lambda url, api_key=None: Client(url, transport=httpx.MockTransport(interrupted)),
    )
    found = run("merge", recipe, "s3://bucket/out", "--url", URL)
    assert found.exit_code == 130
    assert found.stderr.splitlines()[-1] == f"{JOB} was cancelled"
    cancelled = service.asked.index(("POST", f"/v1/merges/{JOB}/cancel"))
    looks = [asked for asked in service.asked[cancelled + 1 :] if not asked[1].endswith("/events")]
    assert looks == [("GET", f"/v1/merges/{JOB}")] * 2


def test_delete(service: Service) -> None:
    found = run("delete", JOB, "--url", URL)
    assert (found.exit_code, found.stdout) == (0, f"{JOB} is deleted; what it wrote is not\n")
    assert service.asked == [("DELETE", f"/v1/merges/{JOB}")]
    assert run("delete", "../keys", "--url", URL).exit_code == 1
    assert len(service.asked) == 1


def test_a_service_that_is_not_there(recipe: Path) -> None:
    found = run("list", "--url", "http://127.0.0.1:1")
    assert found.exit_code == 1
    assert "http://127.0.0.1:1" in found.stderr
    assert "mergemill up" in found.stderr
    assert "Traceback" not in found.stderr


def test_status_and_list(service: Service) -> None:
    service.error = {"type": "PlanError", "detail": "x", "problems": ["one", "two"]}
    service.states = ["failed"]
    shown = run("status", JOB, "--url", URL).stdout.splitlines()
    assert shown[0] == f"{JOB}  failed"
    assert [line.split(maxsplit=1)[1] for line in shown if line.startswith("  error")] == ["one", "two"]
    header, row = run("list", "--url", URL).stdout.splitlines()
    assert header.split() == ["job", "state", "method", "progress", "created", "output", "why"]
    assert row.split() == [
        JOB, "failed", "ties", "2026-01-02", "03:04:05", "s3://bucket/out", "one", "(and", "1", "more)"
    ]  # fmt: skip
    assert json.loads(run("list", "--url", URL, "--json").stdout)[0]["id"] == JOB


def test_plan_needs_no_server(recipe: Path) -> None:
    found = run("plan", recipe, "out", "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["tensors"] == 1
    table = run("plan", recipe).stdout
    assert "a worker at most: " in table
    assert "GPU" not in table
    assert not any(line.endswith(" ") for line in table.splitlines())


def test_plan_lists_what_is_wrong(recipe: Path) -> None:
    write_checkpoint(recipe.parent / "models" / "b", {"w": torch.zeros(5), "extra": torch.zeros(1)})
    found = run("plan", recipe)
    assert found.exit_code == 1
    assert found.stderr.startswith("error: 2 problems:")
    assert "extra" in found.stderr
    found = run("plan", recipe, "models/a")
    assert found.exit_code == 1


def test_paths_that_lead_nowhere(recipe: Path) -> None:
    recipe.write_text("merge_method: linear\nmodels: [{model: ./none}, {model: /none}]\n")
    found = run("plan", recipe)
    assert found.exit_code == 1
    assert found.stderr.count("there is no directory") == 2


def test_methods_need_no_server() -> None:
    found = run("methods")
    assert found.exit_code == 0
    assert {"linear", "slerp", "ties"} <= {line.split()[0] for line in found.stdout.splitlines()}


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("MERGEMILL_PORT", "http", "port"),
        ("MERGEMILL_MODEL_ROOTS", "{", "model_roots"),
        ("MERGEMILL_LOG_FORMAT", "xml", "log_format"),
    ],
)
def test_wrong_settings_are_named(name: str, value: str, named: str) -> None:
    found = run("serve", env={name: value})
    assert found.exit_code == 2
    assert named in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(("given", "roots"), [(None, ()), ('["/data"]', ("/data",)), ('["/"]', ("/",))])
def test_what_works_for_others_uses_no_directory_that_is_not_named(
    given: str | None, roots: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr("service.running.scheduler.main", lambda settings, _: seen.append(settings))
    assert run("schedule", env={"MERGEMILL_STORE__FILE_ROOTS": given} if given else {}).exit_code == 0
    assert [settings.store.file_roots for settings in seen] == [roots]
    monkeypatch.setattr("api.app.create_app", lambda settings: seen.append(settings) or sys.exit(9))
    run("serve", env={"MERGEMILL_STORE__FILE_ROOTS": given} if given else {})
    assert [settings.store.file_roots for settings in seen] == [roots, roots]


@pytest.mark.parametrize(
    ("host", "env", "roots"),
    [
        ("127.0.0.1", {}, '["/"]'),
        ("0.0.0.0", {}, None),
        ("127.0.0.1", {"MERGEMILL_STORE__FILE_ROOTS": "[]"}, "[]"),
        ("127.0.0.1", {"MERGEMILL_STORE": '{"file_roots": ["/data"]}'}, None),
    ],
)
def test_a_stack_on_loopback_may_use_all_that_its_user_may(
    host: str, env: dict[str, str], roots: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert (
        child_environment({}, host=host, redis_url="redis://x", state_dir=tmp_path).get(FILE_ROOTS) == roots
    )
