"""``/v1/merges``: submit, list, look at, cancel and download merges."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, RedirectResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from api.deps import JobsDep, SettingsDep, StoreDep, plan_options
from api.schemas import File, FileList, Job, JobList, MergeRequest, OptionsBody, job_of
from service.jobs import CancelRequested, JobRecord, JobState, new_job
from service.planning import resolve_model
from service.recipe import parse_recipe, parse_yaml, validation_problems
from service.settings import Settings
from workers.errors import ConflictError, ObjectNotFoundError, RecipeError, StoreError
from workers.store.uris import join, normalise, scheme, to_path

router = APIRouter(prefix="/v1/merges", tags=["merges"])

BASE = "/v1/merges"
YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")
MAX_BODY_BYTES = 2 << 20
MAX_PAGE = 200

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": MergeRequest.model_json_schema()},
            "application/yaml": {
                "schema": {"type": "string", "description": "mergekit's YAML; give ?output="}
            },
        },
    }
}


@router.post("", status_code=202, response_model=Job, openapi_extra=_BODY)
async def submit(
    request: Request,
    response: Response,
    settings: SettingsDep,
    jobs: JobsDep,
    output: Annotated[str | None, Query(description="with a YAML body: where the checkpoint goes")] = None,
    overwrite: Annotated[
        bool | None, Query(description="with a YAML body: replace a checkpoint there")
    ] = None,
) -> Job:
    """Accept a merge. The recipe is checked now; models are opened, checked and priced when planning."""
    body = await _body(request)
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind in YAML_TYPES:
        recipe = parse_yaml(body.decode("utf-8", "strict"))
        if output is None:
            raise RecipeError("output: give the place of the checkpoint as the query parameter `output`")
        wanted, options = output, OptionsBody(overwrite=overwrite)
    else:
        try:
            merge = MergeRequest.model_validate_json(body)
        except ValidationError as error:
            raise RecipeError(*validation_problems(error)) from error
        recipe, wanted, options = parse_recipe(merge.recipe), merge.output, merge.options
    problems = [problem for name in recipe.names for problem in _model_problems(name, settings)]
    try:
        place = normalise(wanted)
    except StoreError as error:
        problems.append(f"output: {error}")
    if problems:
        raise RecipeError(*problems)
    record = new_job(
        recipe.to_json(), place, plan_options(settings, options).model_dump(mode="json"), time.time()
    )
    await run_in_threadpool(jobs.create, record)
    response.headers["Location"] = f"{BASE}/{record.id}"
    return job_of(await run_in_threadpool(jobs.status, record.id), BASE)


@router.get("", response_model=JobList)
def list_merges(
    jobs: JobsDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before")] = None,
    state: JobState | None = None,
) -> JobList:
    """Jobs, newest first, a page at a time."""
    try:
        page = jobs.list(limit, cursor, state)
    except ValueError as error:
        raise RecipeError(f"cursor: {error}") from error
    found = tuple(job_of(jobs.status(record.id), BASE) for record in page.records)
    return JobList(jobs=found, next_cursor=page.cursor)


@router.get("/{job}", response_model=Job)
def get_merge(job: str, jobs: JobsDep) -> Job:
    """One job, with its progress, price and history."""
    return job_of(jobs.status(job), BASE)


@router.post("/{job}/cancel", status_code=202, response_model=Job)
def cancel(job: str, jobs: JobsDep) -> Job:
    """Ask for a job's end: 409 once it commits or has ended. The state becomes `cancelled` when it has."""
    jobs.apply(job, CancelRequested())
    return job_of(jobs.status(job), BASE)


@router.get("/{job}/files", response_model=FileList)
def files(job: str, request: Request, jobs: JobsDep, store: StoreDep, settings: SettingsDep) -> FileList:
    """The files of a merged checkpoint, with URLs to download them from."""
    record = jobs.get(job)
    found = []
    for file in _listing(record):
        served = str(request.url_for("download", job=job, name=file["name"]))
        url = store.presign(join(record.output, file["name"]), settings.presign_seconds) or served
        found.append(File(**file, url=url))
    return FileList(files=tuple(found))


@router.get("/{job}/files/{name}", response_class=Response)
def download(job: str, name: str, jobs: JobsDep, store: StoreDep, settings: SettingsDep) -> Response:
    """One file: served with Range support from a directory, redirected to a presigned URL on S3."""
    record = jobs.get(job)
    if name not in {file["name"] for file in _listing(record)}:
        raise ObjectNotFoundError(f"{job} has no file {name!r}")
    uri = join(record.output, name)
    if scheme(uri) == "file":
        store.head(uri)
        return FileResponse(to_path(uri), filename=name, media_type="application/octet-stream")
    url = store.presign(uri, settings.presign_seconds)
    if url is None:
        raise StoreError(f"{uri} cannot be presigned")
    return RedirectResponse(url, status_code=307)


def _listing(record: JobRecord) -> list[dict[str, Any]]:
    if record.state != JobState.SUCCEEDED or record.summary is None:
        raise ConflictError(f"{record.id} is {record.state}: there are files once it has succeeded")
    found: list[dict[str, Any]] = record.summary["files"]
    return found


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RecipeError(f"the request is longer than {MAX_BODY_BYTES} bytes")
    return body


def _model_problems(name: str, settings: Settings) -> list[str]:
    try:
        resolve_model(name, settings.model_roots)
    except RecipeError as error:
        return [f"models: {problem}" for problem in error.problems]
    return []
