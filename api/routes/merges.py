"""``/v1/merges``: submit, list, look at, cancel, delete and download merges."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any

import structlog
from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from api.auth import CallerDep, JobsDep
from api.bodies import Body, BodyDep, Wanted, read
from api.deps import PlanLimiterDep, SettingsDep, StoreDep, SweepsDep
from api.files import served
from api.idempotency import REPLAYED, KeyDep, once_of
from api.looking import granted, plan_wanted, refuse_oversize, refuse_taken
from api.observing import origin
from api.openapi import problems, recipe_body
from api.routing import readable
from api.schemas import File, FileList, Job, JobList, MergeRequest, job_of
from service.access import confine
from service.jobs.pages import JobStatus
from service.jobs.record import JobState, new_job
from service.jobs.transitions import CancelRequested
from service.planning.places import resolve_model
from service.running.delivery import check_in_place, listed
from service.settings import Settings
from workers.errors import ObjectNotFoundError, OutputReplacedError, RecipeError, StoreError
from workers.store.local import LocalStore
from workers.store.uris import join, scheme

router = APIRouter(prefix="/v1/merges", tags=["merges"])

log = structlog.get_logger(__name__)

BASE = "/v1/merges"
MAX_PAGE = 200
BYTES = "application/octet-stream"

_FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", "content": {BYTES: {}}},
    206: {"description": "The part of it that `Range` asks for", "content": {BYTES: {}}},
    307: {"description": "Where it is: a presigned URL"},
    416: {"description": "The file has no such range"},
}


@router.post(
    "",
    status_code=202,
    response_model=Job,
    openapi_extra=recipe_body(MergeRequest),
    responses=problems(400, 408, 413, 415, 422, 503),
)
async def submit(
    caller: CallerDep,
    body: BodyDep,
    key: KeyDep,
    request: Request,
    response: Response,
    settings: SettingsDep,
    jobs: JobsDep,
    store: StoreDep,
    limiter: PlanLimiterDep,
) -> Job:
    """Accept a merge. The recipe is checked now; models are opened, checked and priced when planning.

    An output that holds a checkpoint is refused, unless `overwrite` is set.

    With an `Idempotency-Key` that came before, the job of that time is answered, as it is now, and
    `Idempotent-Replayed: true` says so; 422, when another request came with it.

    A recipe that is refused has its models and its output looked at now, so that all there is to mend is said.
    """
    wanted = await run_sync(_checked, body, settings)
    access = await run_sync(granted, caller, wanted, settings)
    if wanted.problems:
        await run_sync(plan_wanted, wanted, settings, store, access, limiter=limiter)
    assert wanted.recipe is not None and wanted.output is not None  # noqa: S101 - it is a whole request
    remembered_s, owner = settings.idempotency_seconds, jobs.key or ""
    once = await run_sync(once_of, key, request, body, wanted, remembered_s, owner)
    # What was accepted once is not refused for the output that it has made since, nor for another limit.
    if await run_sync(jobs.made_by, once) is None:
        if not wanted.options.overwrite:
            await refuse_taken(confine(store, access, wanted.output), wanted.output, limiter)
        await refuse_oversize(wanted, settings, store, access, limiter)
    options = wanted.options.model_dump(mode="json")
    record = new_job(
        wanted.recipe.to_json(),
        wanted.output,
        options,
        time.time(),
        origin(),
        key=jobs.key,
        access=access,
        priority=wanted.priority,
    )
    made = await run_sync(jobs.create, record, once, wanted.webhook)
    response.headers["Location"] = f"{BASE}/{made}"
    if made != record.id:
        response.headers[REPLAYED] = "true"
        return job_of(await run_sync(jobs.status, made), BASE)
    log.info("job accepted", job=record.id)
    return job_of(JobStatus(record), BASE)  # not read again: if that failed, nobody would know of the job


@readable(router, "", response_model=JobList, responses=problems(400, 422, 503))
def list_merges(
    jobs: JobsDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before")] = None,
    state: JobState | None = None,
) -> JobList:
    """Jobs, newest first, a page at a time."""
    page = jobs.list(limit, cursor, state)
    return JobList(jobs=tuple(job_of(status, BASE) for status in page.statuses), next_cursor=page.cursor)


@readable(router, "/{job}", response_model=Job, responses=problems(404, 503))
def get_merge(job: str, jobs: JobsDep) -> Job:
    """One job, with its progress, price and history."""
    return job_of(jobs.status(job), BASE)


@router.post("/{job}/cancel", status_code=202, response_model=Job, responses=problems(404, 409, 503))
def cancel(job: str, jobs: JobsDep) -> Job:
    """Ask for a job's end: 409 once it commits or has ended. The state becomes `cancelled` when it has."""
    jobs.apply(job, CancelRequested())
    return job_of(jobs.status(job), BASE)


@router.delete("/{job}", status_code=204, responses=problems(404, 409, 503))
def delete(job: str, jobs: JobsDep, sweeps: SweepsDep) -> None:
    """Forget a job that has ended, with its events and deliveries; 409 while it goes on.

    What it wrote stays: its output belongs to whoever can write there.
    """
    jobs.get(job)  # others' jobs are not there
    sweeps.forget(job)
    log.info("job deleted", job=job)


@readable(router, "/{job}/files", response_model=FileList, responses=problems(404, 409, 410, 502, 503))
def files(job: str, request: Request, jobs: JobsDep, store: StoreDep, settings: SettingsDep) -> FileList:
    """The files of a merged checkpoint, with URLs to download them from; 410 when they were replaced since."""
    record = jobs.get(job)
    store = confine(store, record.access, record.output)
    found = []
    check_in_place(record, jobs, store)
    for file in listed(record):
        served = str(request.url_for("download", job=job, name=file["name"]))
        url = store.presign(join(record.output, file["name"]), settings.presign_seconds) or served
        found.append(File(**file, url=url))
    return FileList(files=tuple(found))


@readable(
    router,
    "/{job}/files/{name}",
    response_class=Response,
    responses={**_FILE, **problems(404, 409, 410, 502, 503)},
)
def download(
    job: str, name: str, request: Request, jobs: JobsDep, store: StoreDep, settings: SettingsDep
) -> Response:
    """One file: served with Range support from a directory, redirected to a presigned URL on S3."""
    record = jobs.get(job)
    sizes = {file["name"]: file["size"] for file in listed(record)}
    if name not in sizes:
        raise ObjectNotFoundError(f"{job} has no file {name!r}")
    store = confine(store, record.access, record.output)
    check_in_place(record, jobs, store)
    uri = join(record.output, name)
    size = store.head(uri).size
    if size != sizes[name]:
        raise OutputReplacedError(
            f"{uri} has {size} bytes, and {job} wrote {sizes[name]}: it was changed since"
        )
    if scheme(uri) == "file":
        return served(LocalStore(settings.store), uri, record.access)
    if request.method == "HEAD":  # a presigned URL is for GET alone
        headers = {"Content-Length": str(size), "Accept-Ranges": "bytes"}
        return Response(headers=headers, media_type=BYTES)
    url = store.presign(uri, settings.presign_seconds)
    if url is None:
        raise StoreError(f"{uri} cannot be presigned")
    return RedirectResponse(url, status_code=307)


def _checked(body: Body, settings: Settings) -> Wanted:
    """What is wanted; a model that can be nowhere is as wrong as a parameter that there is none of."""
    wanted = read(body, settings, MergeRequest)
    problems = list(wanted.problems)
    for name in wanted.recipe.places if wanted.recipe is not None else ():
        try:
            resolve_model(name, settings.model_roots)
        except RecipeError as error:
            problems += error.problems
    return replace(wanted, problems=tuple(problems))
