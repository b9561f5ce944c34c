"""Look at everything that a request is about, and say all that is wrong with it at once."""

from __future__ import annotations

from anyio import CapacityLimiter, move_on_after
from anyio.to_thread import run_sync

from api.bodies import Wanted
from service.access import confine, grant, size_problems
from service.commit import holds_checkpoint, output_problems
from service.keys import Access, ApiKey
from service.planning import Planned, examine
from service.settings import Settings
from workers.errors import ForbiddenError, PlanError, RecipeError, StoreError
from workers.store.base import ObjectStore

LOOK_S = 3.0
"""How long a submission waits for what the store says about its output, in seconds."""


async def refuse_taken(store: ObjectStore, output: str, limiter: CapacityLimiter) -> None:
    """Refuse an output that holds a checkpoint. A store that fails or is slow settles nothing: planning will tell.

    :raises PlanError: it does.
    """
    taken = None
    with move_on_after(LOOK_S):
        taken = await run_sync(_taken, store, output, limiter=limiter, abandon_on_cancel=True)
    if taken is not None:
        raise PlanError(taken)


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
    :raises StoreUnavailableError: nothing is wrong so far, but the store is out of reach.
    """
    problems = list(wanted.problems)
    store = confine(store, access, wanted.output)
    outcome = None
    if wanted.recipe is not None:
        outcome = examine(
            wanted.recipe,
            wanted.options,
            store,
            settings.model_roots,
            settings.worker_baseline_bytes,
            wanted.output,
        )
        problems += [*outcome.problems, *size_problems(access, outcome.price)]
    if wanted.output is not None:
        problems += output_problems(store, wanted.output, wanted.options.overwrite)
    if outcome is not None and not problems:
        return outcome.result()
    problems += outcome.away if outcome is not None else ()
    raise (RecipeError if wanted.problems else PlanError)(*dict.fromkeys(problems))
