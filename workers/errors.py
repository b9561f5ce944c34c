"""Every error that Mergemill raises on purpose.

::

    MergemillError
    ├── RecipeError (ValueError)             the recipe cannot be understood
    ├── PlanError (ValueError)               the recipe and its inputs do not fit; lists every problem
    ├── HeaderError (ValueError)             a safetensors header is malformed
    ├── NonFiniteError (ArithmeticError)     NaN or Inf in an input, or an overflow on rounding
    ├── RequestError                         an HTTP request cannot be taken
    │   ├── MalformedRequestError (ValueError)       it is not what its content type says
    │   │   ├── CursorError                  the cursor is not one that a page gave out
    │   │   └── IdempotencyKeyError          the idempotency key cannot be one
    │   ├── IdempotencyMismatchError         the idempotency key came with another request before
    │   ├── RequestTooLargeError             its body is longer than is read
    │   ├── RequestTimeoutError (TimeoutError)   its body does not come to an end
    │   ├── UnsupportedMediaTypeError        its content type is not one that is read
    │   ├── UnauthenticatedError             it comes without an API key that is good
    │   └── TooManyRequestsError             its key asks too often, or has too many jobs queued
    ├── ForbiddenError                       an API key does not allow this; lists every reason
    ├── KeyNotFoundError (LookupError)       no API key has this id
    ├── ExposedError                         the settings would leave the service open to others
    ├── ServiceUnavailableError (ConnectionError)   the REST API cannot be reached (raised by the client)
    ├── StackError                           the embedded stack did not come up
    ├── StoreError (OSError)                 the object store refused or failed
    │   ├── ObjectNotFoundError (FileNotFoundError)
    │   ├── AccessDeniedError (PermissionError)
    │   ├── AlreadyExistsError (FileExistsError)     put_if_absent lost
    │   ├── ObjectChangedError               the object is not the one that was planned with
    │   ├── CorruptReadError                 the bytes that came are not those that are known to be there
    │   ├── TruncatedReadError (EOFError)    fewer bytes came than were asked for
    │   ├── UploadNotFoundError              the multipart upload is gone (completed or aborted)
    │   ├── InvalidPartError                 complete named a part that the store does not have
    │   └── StoreUnavailableError            it kept failing after every retry
    └── JobError
        ├── JobNotFoundError (LookupError)
        ├── IllegalTransitionError           the job's state does not allow this
        ├── NotReadyError                    the job has not made what is asked for
        ├── OutputReplacedError              what the job made is not there any more
        ├── ConflictError                    somebody else changed the record first
        ├── LeaseLostError                   another scheduler owns the job now
        ├── OutputConflictError              the output is in use or holds a checkpoint
        ├── DamagedClaimError                the claim at an output cannot be read
        ├── NothingToRecoverError            no job can be made again from what is at an output
        ├── JobStoreUnavailableError         Redis cannot be reached, or refuses, after every retry
        ├── JobFailedError                   the job ended in `failed` (raised by the client)
        │   └── JobCancelledError            the job ended in `cancelled` (raised by the client)
        ├── JobTimeoutError (TimeoutError)   the job did not end in time (raised by the client)
        └── FleetError                       the compute cluster cannot run the work

All carry their message in ``args`` alone, so that they survive pickling and JSON.
"""

from __future__ import annotations


class MergemillError(Exception):
    """Base of all errors that Mergemill raises on purpose."""

    part: str | None = None
    """Id of the part that was being made, if one was."""

    @property
    def code(self) -> str:
        """A stable snake_case name for the error, without the trailing ``_error``."""
        name = type(self).__name__.removesuffix("Error")
        return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


class _ListingError(MergemillError):
    """There may be several things wrong at once; ``problems`` lists all of them."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence per problem, each naming what it is about."""
        return tuple(str(problem) for problem in self.args)

    def __str__(self) -> str:
        return "; ".join(self.problems)


class RecipeError(_ListingError, ValueError):
    """The recipe cannot be understood; ``problems`` names each field."""


class PlanError(RecipeError):
    """The recipe and its inputs do not fit together; ``problems`` lists all that was found."""


class HeaderError(MergemillError, ValueError):
    """A safetensors header or shard index is malformed."""


class NonFiniteError(MergemillError, ArithmeticError):
    """An input holds NaN or Inf, or rounding to the output dtype overflowed."""


class RequestError(MergemillError):
    """An HTTP request cannot be taken, whatever it asks for."""


class MalformedRequestError(RequestError, ValueError):
    """The request is not what its content type says, or contradicts itself."""


class CursorError(MalformedRequestError):
    """The cursor is not one that a page of jobs gave out."""


class IdempotencyKeyError(MalformedRequestError):
    """The idempotency key is empty, too long, of other characters than visible ASCII, or there are several."""


class IdempotencyMismatchError(RequestError):
    """The idempotency key came before, with another request than this one."""


class RequestTooLargeError(RequestError):
    """The request's body is longer than is read."""


class RequestTimeoutError(RequestError, TimeoutError):
    """The request's body takes longer to come than is waited for."""


class UnsupportedMediaTypeError(RequestError):
    """The request's content type is not one that is read."""


class UnauthenticatedError(RequestError):
    """The request comes without an API key, or with one that is not good."""


class TooManyRequestsError(RequestError):
    """The request's key asks more often than it may, or has as many jobs queued as it may."""

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def retry_after_s(self) -> float:
        """Seconds after which it may be tried again."""
        return float(self.args[1]) if len(self.args) > 1 else 1.0


class ForbiddenError(_ListingError):
    """The API key does not allow this; ``problems`` says of each thing why."""


class KeyNotFoundError(MergemillError, LookupError):
    """No API key has this id."""


class ExposedError(MergemillError):
    """The settings would leave the service open to whoever can reach it."""


class ServiceUnavailableError(MergemillError, ConnectionError):
    """The REST API cannot be reached, or broke off before it had answered."""


class StackError(MergemillError):
    """The embedded stack did not come up, or could not be kept up."""


class StoreError(MergemillError, OSError):
    """The object store refused or failed."""

    def __str__(self) -> str:  # OSError would print an errno pair for two arguments
        return " ".join(str(argument) for argument in self.args)


class ObjectNotFoundError(StoreError, FileNotFoundError):
    """No object has this name."""


class AccessDeniedError(StoreError, PermissionError):
    """The store does not let these credentials do this."""


class AlreadyExistsError(StoreError, FileExistsError):
    """``put_if_absent`` found an object in place."""


class ObjectChangedError(StoreError):
    """The object's ETag is not the one that the plan was made with."""


class CorruptReadError(StoreError):
    """The bytes that came have another digest than is known of them, and so when they were read again."""


class TruncatedReadError(StoreError, EOFError):
    """Fewer bytes came than were asked for."""


class UploadNotFoundError(StoreError):
    """The multipart upload does not exist: it was completed, aborted or swept."""


class InvalidPartError(StoreError):
    """Completing named a part that the store does not hold with that ETag."""


class StoreUnavailableError(StoreError):
    """The store kept failing after every retry."""


class JobError(MergemillError):
    """Something about a job, not about its mathematics."""


class JobNotFoundError(JobError, LookupError):
    """No job has this id."""


class IllegalTransitionError(JobError):
    """The job's state does not allow this event; a note holds the record's history."""


class NotReadyError(JobError):
    """The job has not made what is asked for: it goes on, or it ended otherwise."""


class OutputReplacedError(JobError):
    """The output holds what somebody else has written since, or nothing."""


class ConflictError(JobError):
    """Somebody else changed the record between our read and our write."""


class LeaseLostError(JobError):
    """Another scheduler owns the job now; whoever sees this must stop touching it."""


class OutputConflictError(JobError):
    """The output is claimed by another job, overlaps an input, or already holds a checkpoint."""


class DamagedClaimError(JobError):
    """The claim beside an output is not one that can be read."""


class NothingToRecoverError(JobError):
    """No job can be made again from what is at an output, or not by whoever asks."""


class JobStoreUnavailableError(JobError):
    """The job store cannot be reached, or refuses to work, after every retry."""


class JobFailedError(JobError):
    """The job ended in ``failed``."""


class JobCancelledError(JobFailedError):
    """The job ended in ``cancelled``."""


class JobTimeoutError(JobError, TimeoutError):
    """The job did not end in the time that the caller gave it; it goes on."""


class FleetError(JobError):
    """The compute cluster cannot run the work that it was given."""


def _all_errors(root: type[MergemillError]) -> dict[str, type[MergemillError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _all_errors(child)
    return found


def to_json(error: BaseException) -> dict[str, object]:
    """Describe ``error`` as JSON: ``{"type", "detail"}``, and ``problems`` and ``part`` where it has them."""
    described: dict[str, object] = {"type": type(error).__name__, "detail": str(error)}
    if isinstance(error, _ListingError):
        described["problems"] = list(error.problems)
    if isinstance(error, MergemillError) and error.part is not None:
        described["part"] = error.part
    return described


def from_json(described: dict[str, object]) -> MergemillError:
    """The inverse of :func:`to_json`; an unknown type becomes a plain :class:`MergemillError`."""
    kind = _all_errors(MergemillError).get(str(described["type"]))
    if kind is None:
        return MergemillError(f"{described['type']}: {described['detail']}")
    problems = described.get("problems")
    if issubclass(kind, _ListingError) and isinstance(problems, list):
        return kind(*(str(problem) for problem in problems))
    return kind(str(described["detail"]))
