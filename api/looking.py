"""Look at everything that a request is about, and say all that is wrong with it at once."""

from __future__ import annotations

from anyio import CapacityLimiter, move_on_after
from anyio.to_thread import run_sync

from api.bodies import Wanted
from service.access import confine, grant, size_problems
from service.keys import Access, ApiKey
from service.planning.planner import Outcome, Planned, examine
from service.running.commit import holds_checkpoint, output_problems
from service.settings import Settings
from workers.errors import ForbiddenError, PlanError, RecipeError, StoreError, TooManyRequestsError
from workers.store.base import ObjectStore

LOOK_S = 3.0
"""How long a submission waits for what the store says about its output, in seconds."""
PRICE_S = 10.0
"""How long it waits for the size of its inputs, where the key has a limit for that."""
LIMIT_RETRY_S = 3600.0
"""A job of too many bytes may be asked for again after this many seconds: not before somebody has raised the limit."""


async def refuse_taken(store: ObjectStore, output: str, limiter: CapacityLimiter) -> None:
    """Refuse an output that holds a checkpoint. A store that fails or is slow settles nothing: planning will tell.

    :raises PlanError: it does.
    """
    taken = None
    with move_on_after(LOOK_S):
        taken = await run_sync(_taken, store, output, limiter=limiter, abandon_on_cancel=True)
    if taken is not None:
        raise PlanError(taken)


async def refuse_oversize(
    wanted: Wanted, settings: Settings, store: ObjectStore, access: Access, limiter: CapacityLimiter
) -> None:
    """Refuse a merge of more input bytes than its key may have. What cannot be told soon is told by planning.

    :raises TooManyRequestsError: it has more.
    """
    sizes: list[str] = []
    if access.input_bytes:
        with move_on_after(PRICE_S):
            sizes = await run_sync(
                _oversize, wanted, settings, store, access, limiter=limiter, abandon_on_cancel=True
            )
    if sizes:
        raise TooManyRequestsError(sizes[0], LIMIT_RETRY_S)


def _oversize(wanted: Wanted, settings: Settings, store: ObjectStore, access: Access) -> list[str]:
    return size_problems(access, _examined(wanted, settings, confine(store, access, wanted.output)).price)


def _examined(wanted: Wanted, settings: Settings, store: ObjectStore) -> Outcome:
    assert wanted.recipe is not None  # noqa: S101 - or there is nothing to look into
    return examine(
        wanted.recipe,
        wanted.options,
        store,
        settings.model_roots,
        settings.worker_baseline_bytes,
        wanted.output,
    )


def _taken(store: ObjectStore, output: str) -> str | None:
    try:
        return holds_checkpoint(store, output)
    except StoreError:
        return None


def granted(caller: ApiKey, wanted: Wanted, settings: Settings) -> Access:
    """Where a merge may read and write that the caller wants. Nothing is looked at before.

    :raises ForbiddenError: the caller's key does not allow all of it; names every place.
    """
    if wanted.priority > 0 and not caller.is_admin:
        raise ForbiddenError(
            f"priority: above 0 it takes an admin's key, which {caller.id} is not; 0 or less is fine"
        )
    names = wanted.recipe.places if wanted.recipe is not None else ()
    limits = settings.limits.with_own(caller.limits)
    return grant(caller, names, wanted.output, settings.model_roots, limits)


def plan_wanted(
    wanted: Wanted, settings: Settings, store: ObjectStore, access: Access | None = None
) -> Planned:
    """Open the models, plan, and look at the place of the output, also when the request itself is wrong already.

    :param access: where it may read and write; ``None`` is everywhere.
    :raises ForbiddenError: a link leads elsewhere.
    :raises RecipeError: the request is wrong; lists every problem, those of its models and output, too.
    :raises PlanError: they do not fit together; lists every problem.
    :raises TooManyRequestsError: nothing is wrong but that the inputs have more bytes than the key may have.
    :raises StoreUnavailableError: nothing is wrong so far, but the store is out of reach.
    """
    problems = list(wanted.problems)
    store = confine(store, access, wanted.output)
    outcome = None
    if wanted.recipe is not None:
        outcome = _examined(wanted, settings, store)
        problems += outcome.problems
    if wanted.output is not None:
        problems += output_problems(store, wanted.output, wanted.options.overwrite)
    sizes = [] if outcome is None else size_problems(access, outcome.price)
    if outcome is not None and not problems:
        if sizes:
            raise TooManyRequestsError(sizes[0], LIMIT_RETRY_S)
        return outcome.result()
    problems += sizes
    problems += outcome.away if outcome is not None else ()
    raise (RecipeError if wanted.problems else PlanError)(*dict.fromkeys(problems))
