"""``/v1/merges/{id}/events``: what happens to a merge, as it happens."""

from __future__ import annotations

from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from api.auth import CallerDep, JobsDep, still_good
from api.deps import KeysDep, StreamsDep
from api.openapi import problems
from api.routing import readable
from service.jobs.events import last_event, read_id

router = APIRouter(prefix="/v1/merges", tags=["merges"])

EVENT_STREAM = "text/event-stream"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events as they happen, each with its `id`, its name as `event`, and JSON as `data`: "
        "`job`, `event`, `state`, `version`, `at`, `detail` and `progress`; the one that ends the job ends the stream",
        "content": {EVENT_STREAM: {"schema": {"type": "string"}}},
    },
    204: {
        "description": "The job has ended, and the client had its last event: there is no reason to come again"
    },
}


@readable(
    router,
    "/{job}/events",
    response_class=Response,
    responses={**_STREAM, **problems(400, 404, 503)},
)
async def events(
    job: str,
    request: Request,
    caller: CallerDep,
    jobs: JobsDep,
    keys: KeysDep,
    streams: StreamsDep,
    last_event_id: Annotated[
        str, Query(description="As the header `Last-Event-ID`, which goes before it")
    ] = "",
    last_event_header: Annotated[
        str, Header(alias="Last-Event-ID", description="Id of the last event that came: go on after it")
    ] = "",
) -> Response:
    """Follow a merge from its beginning, or from where a stream broke off (server-sent events).

    Every change of the job comes exactly once and in order; progress about once a second. A silent stream has
    a comment every 15 seconds. The latest 2,000 events or so are kept.
    """
    status = await run_sync(jobs.status, job)
    last = last_event_header or last_event_id
    after = read_id(last) if last else None
    look = await streams.look(job, after)
    if after is not None and look.state.is_terminal and not look.events:
        return Response(status_code=204, headers=HEADERS)
    if request.method == "HEAD":
        return Response(headers=HEADERS, media_type=EVENT_STREAM)
    ended = last_event(status) if status.record.state.is_terminal else None

    async def may() -> bool:
        return await run_sync(still_good, caller, keys)

    return StreamingResponse(
        streams.follow(job, look, after, ended, may), headers=HEADERS, media_type=EVENT_STREAM
    )
