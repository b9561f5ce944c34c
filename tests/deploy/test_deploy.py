"""The manifests agree with each other and the code; deploy/README.md says what only an engine can tell."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from pydantic import BaseModel

from service.settings import Settings

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
KUBERNETES = list(yaml.safe_load_all((ROOT / "deploy/kuberay.yaml").read_text()))
LAUNCHER = yaml.safe_load((ROOT / "deploy/ray-cluster.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GUIDES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md"), ROOT / "CONTRIBUTING.md"])


def _instructions(text: str) -> list[tuple[str, list[str]]]:
    """A Dockerfile without here-documents as ``(instruction, words)``."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(words[0].upper(), words[1:]) for words in map(str.split, joined.splitlines()) if words]


def _stages() -> dict[str, tuple[str, list[tuple[str, list[str]]]]]:
    """Stage name to its parent and its instructions."""
    stages: dict[str, tuple[str, list[tuple[str, list[str]]]]] = {}
    for name, words in _instructions((ROOT / "Dockerfile").read_text()):
        if name == "FROM":
            parent, as_, stage = words
            assert as_ == "AS"
            stages[stage] = (parent, [])
        else:
            stages[stage][1].append((name, words))
    return stages


STAGES = _stages()


def _inherited(stage: str) -> list[tuple[str, list[str]]]:
    """The instructions of a stage after those of the stages that it is built on."""
    parent, own = STAGES[stage]
    return [*(_inherited(parent) if parent in STAGES else []), *own]


def _settings(model: type[BaseModel] = Settings, prefix: str = "MERGEMILL_") -> dict[str, str]:
    """Every environment variable that sets something, with its default as the guide writes it."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= _settings(kind, f"{prefix}{name.upper()}__")
        else:
            found[f"{prefix}{name.upper()}"] = "–" if field.default is None else f"`{field.default}`"
    return found


def _pinned(image: str) -> bool:
    tag = image.rpartition("/")[2].partition(":")[2]
    return any(c.isdigit() for c in tag) or "@sha256:" in image


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_says_when_it_is_healthy(name: str) -> None:
    check = SERVICES[name].get("healthcheck")
    waiting = [
        condition["condition"]
        for service in SERVICES.values()
        for other, condition in service.get("depends_on", {}).items()
        if other == name
    ]
    if check is None:  # then it runs the image as it is, with the image's own check
        assert "command" not in SERVICES[name]
        assert any(
            instruction == "HEALTHCHECK" for instruction, _ in _inherited(SERVICES[name]["build"]["target"])
        )
    elif check.get("disable"):  # a service that runs once: others wait for it to end well
        assert waiting
        assert set(waiting) == {"service_completed_successfully"}
        assert "restart" not in SERVICES[name]
    else:
        assert check["test"][0] in {"CMD", "CMD-SHELL"}
        assert set(waiting) <= {"service_healthy"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_built_from_a_target_or_runs_a_pinned_image(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert service["build"]["target"] in STAGES
        assert service["image"] == f"mergemill:{service['build']['target']}"
    else:
        assert _pinned(service["image"])


def test_dependencies_are_services_without_cycles() -> None:
    done: set[str] = set()
    while done != set(SERVICES):
        ready = {name for name in SERVICES if set(SERVICES[name].get("depends_on", {})) <= done} - done
        assert ready, f"not startable: {set(SERVICES) - done}"
        done |= ready


def test_only_loopback_is_published_and_no_store_of_secrets() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"api", "s3"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_volumes_are_declared() -> None:
    used = {
        volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])
    }
    assert used == set(COMPOSE["volumes"])


def test_redis_forgets_nothing() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    for setting in (
        "--appendonly yes",
        "--appendfsync always",
        "--maxmemory-policy noeviction",
        "--requirepass $",
    ):
        assert setting in command
    assert int(SERVICES["redis"]["image"].partition(":")[2].partition(".")[0]) >= 7


def test_everybody_who_moves_bytes_can_reach_the_store() -> None:
    wanted = {"MERGEMILL_STORE__S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    for name in ("api", "scheduler", "ray-worker", "ray-worker-gpu", "bucket"):
        assert wanted <= set(SERVICES[name]["environment"]), name


def test_passwords_and_tokens_are_on_by_default() -> None:
    redis = SERVICES["redis"]
    password = redis["command"][redis["command"].index("--requirepass") + 1]
    assert password == redis["environment"]["REDISCLI_AUTH"]
    assert re.fullmatch(r"\$\{REDIS_PASSWORD:-\S{20,}\}", password)
    for name in ("api", "scheduler"):
        assert f"redis://:{password}@redis" in SERVICES[name]["environment"]["MERGEMILL_REDIS_URL"]
    for name in ("ray-head", "ray-worker", "ray-worker-gpu", "scheduler"):
        environment = SERVICES[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert re.fullmatch(r"\$\{RAY_AUTH_TOKEN:-\S{20,}\}", environment["RAY_AUTH_TOKEN"])
    cluster = next(document for document in KUBERNETES if document["kind"] == "RayCluster")["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"] for group in groups]
    pods += [d["spec"]["template"] for d in KUBERNETES if d["metadata"]["name"] == "mergemill-scheduler"]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in environment["RAY_AUTH_TOKEN"]["valueFrom"]
    assert "--env=RAY_AUTH_MODE=token" in LAUNCHER["docker"]["run_options"]


def test_no_request_leads_to_a_containers_disk() -> None:
    for name in ("api", "scheduler"):
        assert SERVICES[name]["environment"]["MERGEMILL_STORE__FILE_ROOTS"] == "[]"


def test_ray_nodes_share_a_token_and_the_ports_that_are_probed() -> None:
    nodes = {name: SERVICES[name] for name in ("ray-head", "ray-worker", "ray-worker-gpu", "scheduler")}
    assert (
        len(
            {
                json.dumps([node["environment"][key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")])
                for node in nodes.values()
            }
        )
        == 1
    )
    for name, node in nodes.items():
        started = (
            (ROOT / "deploy/schedule-on-ray").read_text()
            if name == "scheduler"
            else " ".join(node["command"])
        )
        assert re.search(r"--node-manager-port=\S*\b6380\b", started), name
        assert "/6380" in node["healthcheck"]["test"][-1]


@pytest.mark.parametrize("name", ["ray-head", "ray-worker", "ray-worker-gpu"])
def test_a_ray_node_offers_what_it_is_told_to(name: str) -> None:
    command = " ".join(SERVICES[name]["command"])
    offered = [re.search(rf"--{option}=(?:\S*:-)?(\d+)", command) for option in ("num-cpus", "memory")]
    assert all(offered)
    cpus, memory = (int(match[1]) for match in offered if match)
    budget = Settings.model_fields["worker_memory_bytes"].default
    assert memory == cpus * budget  # as many tasks at their full budget as there are CPUs; none on the head


def test_named_settings_exist() -> None:
    settings = set(_settings())
    named = {key for service in SERVICES.values() for key in service.get("environment", {})}
    named |= {
        word.partition("=")[0]
        for stage in STAGES
        for name, words in STAGES[stage][1]
        if name == "ENV"
        for word in words
    }
    for text in (ROOT / "deploy/kuberay.yaml", ROOT / "deploy/create-bucket", *GUIDES):
        named |= set(re.findall(r"\bMERGEMILL_[A-Z0-9_]+[A-Z0-9]\b", text.read_text()))
    named = {name for name in named if name.startswith("MERGEMILL_")}
    # The client's variables, the compose file's own, and the oracle's are no settings of the service.
    clients = {"MERGEMILL_URL", "MERGEMILL_API_KEY"}
    assert named - settings <= {*clients, "MERGEMILL_BUCKET", "MERGEMILL_ORACLE_PYTHON"}
    assert "MERGEMILL_STORE__S3_ENDPOINT_URL" in named


def test_the_guide_lists_every_setting_with_its_default() -> None:
    guide = (ROOT / "docs/operations.md").read_text()
    rows = re.findall(
        r"^\| `(MERGEMILL_[A-Z0-9_]+)` \| (\S+) \| \S", guide.partition("## All settings")[2], re.MULTILINE
    )
    assert dict(rows) == _settings()


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_target_is_whole_and_unprivileged(target: str) -> None:
    instructions = _inherited(target)
    last = dict(instructions)
    assert last["USER"] == ["10001:10001"]
    assert "tini" in "".join(last["ENTRYPOINT"])
    assert "serve" in "".join(last["CMD"])
    assert "/healthz" in " ".join(last["HEALTHCHECK"])
    stages = [
        word.partition("=")[2]
        for name, words in instructions
        if name == "COPY"
        for word in words
        if "--from" in word
    ]
    assert stages == [f"dependencies-{target}"]


def test_every_stage_stands_on_a_stage_or_a_pinned_image() -> None:
    known: set[str] = set()
    for stage, (parent, instructions) in STAGES.items():
        assert parent in known or _pinned(parent)
        mentioned = re.findall(r"\bfrom=(\w[\w-]*)", " ".join(" ".join(words) for _, words in instructions))
        assert set(mentioned) <= known
        known.add(stage)


def test_what_the_image_copies_is_there_and_in_the_build_context() -> None:
    copies = [
        words
        for _, own in STAGES.values()
        for name, words in own
        if name == "COPY" and "--from" not in words[0]
    ]
    sources = {word for words in copies for word in words[:-1] if not word.startswith("--")}
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert sources == let_through
    assert not [source for source in sources if not (ROOT / source).exists()]
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]["packages"]
    assert set(packages) <= sources


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_versions_agree() -> None:
    pins = _pins()
    torch = next(line for line in PROJECT["dependencies"] if line.startswith("torch=")).partition("==")[2]
    assert torch == pins["torch"]
    assert f"TORCH := torch=={torch}\n" in (ROOT / "Makefile").read_text()
    (cluster,) = (document for document in KUBERNETES if document["kind"] == "RayCluster")
    assert cluster["spec"]["rayVersion"] == pins["ray"]


def test_every_dependency_is_pinned_without_a_local_version() -> None:
    pins = {name.lower().replace("_", "-"): version for name, version in _pins().items()}
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + extras["demo"] + extras["otel"] + extras["dev"]
    wanted = {re.sub(r"[^\w.-].*", "", line).lower() for line in lines}
    assert wanted <= set(pins)
    assert not [name for name, version in pins.items() if "+" in version]


def test_the_launcher_file_fits_rays_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(LAUNCHER, schema)
    assert LAUNCHER["head_node_type"] in LAUNCHER["available_node_types"]


def test_kubernetes_objects_name_what_exists() -> None:
    kinds = [document["kind"] for document in KUBERNETES]
    assert kinds == ["ServiceAccount", "RayCluster", "Deployment", "Deployment", "Service"]
    for document in KUBERNETES:
        if document["kind"] == "Deployment":
            assert (
                document["spec"]["selector"]["matchLabels"]
                == document["spec"]["template"]["metadata"]["labels"]
            )
    labels = [d["spec"]["template"]["metadata"]["labels"] for d in KUBERNETES if d["kind"] == "Deployment"]
    assert KUBERNETES[-1]["spec"]["selector"] in labels


def test_ci_runs_exactly_what_the_readme_says() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    made = [line for line in script.read_text().splitlines() if line.startswith("make")]
    commands = [" ".join(line.split()[:2]) for line in made]
    assert commands == ["make check", "make chaos", "make chaos", "make test"]


@pytest.mark.parametrize("guide", [ROOT / "README.md", *GUIDES], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(guide: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", guide.read_text())
    missing = [target for target in targets if "://" not in target and not (guide.parent / target).exists()]
    assert not missing
