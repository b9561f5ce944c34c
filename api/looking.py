"""Look at everything that a request is about, and say all that is wrong with it at once."""

from __future__ import annotations

from anyio import CapacityLimiter, move_on_after
from anyio.to_thread import run_sync

from api.bodies import Wanted
from service.commit import holds_checkpoint, output_problems
from service.planning import Planned, examine
from service.settings import Settings
from workers.errors import PlanError, RecipeError, StoreError
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


def plan_wanted(wanted: Wanted, settings: Settings, store: ObjectStore) -> Planned:
    """Open the models, plan, and look at the place of the output, also when the request itself is wrong already.

    :raises RecipeError: the request is wrong; lists every problem, those of its models and output, too.
    :raises PlanError: they do not fit together; lists every problem.
    :raises StoreUnavailableError: nothing is wrong so far, but the store is out of reach.
    """
    problems = list(wanted.problems)
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
        problems += outcome.problems
    if wanted.output is not None:
        problems += output_problems(store, wanted.output, wanted.options.overwrite)
    if outcome is not None and not problems:
        return outcome.result()
    problems += outcome.away if outcome is not None else ()
    raise (RecipeError if wanted.problems else PlanError)(*dict.fromkeys(problems))
