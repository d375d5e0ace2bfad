"""What can go wrong between a run and the Hub, told in a sentence that says what is safe and what to do."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

logger = logging.getLogger(__name__)

_REFUSED = (401, 403)
# The client's error for an answer of the Hub derives from its HTTP library's, as those without an answer do.
_TRANSPORT = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError, LocalTokenNotFoundError)
_LONGEST_REASON = 300


class PushError(RuntimeError):
    """The Hub did not take what was sent; everything is on this machine."""


@contextlib.contextmanager
def told_plainly(repository: str, folder: str) -> Iterator[None]:
    """Turn failures of the Hub or of the way to it into a `PushError`; all other errors pass.

    Args:
        repository: where to.
        folder: that holds the run.
    """
    try:
        yield
    except PushError:  # of a repository that is created on the way to a push
        raise
    except Exception as error:
        if (failure := _failure(error)) is None:
            raise
        raise PushError(message(failure, repository, folder)) from error


def watch(jobs: Iterable[Future[Any]], repository: str, folder: str) -> None:
    """Log the failure of each background push when it happens; Trainer waits for these jobs and never asks them."""

    def report(job: Future[Any]) -> None:
        error = None if job.cancelled() else job.exception()
        if error is not None:
            logger.warning("%s Training goes on.", message(_failure(error) or error, repository, folder))

    for job in jobs:
        job.add_done_callback(report)


def message(failure: BaseException, repository: str, folder: str) -> str:
    """What happened, what is safe, what to do."""
    reason = " ".join(str(failure).split()) or type(failure).__name__
    reason = reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 1] + "…"
    status = getattr(getattr(failure, "response", None), "status_code", None)
    if status in _REFUSED or isinstance(failure, LocalTokenNotFoundError):
        what = f"The Hub refused the token for {repository}"
        remedy = "Give one that may write there with `hf auth login`, HF_TOKEN or --hub_token, then"
    else:
        what = f"The push to {repository} did not get through"
        remedy = "When the Hub can be reached,"
    again = f"hf upload {shlex.quote(repository)} {shlex.quote(folder)} --exclude 'checkpoint-*'"
    return f"{what}: {reason} What this run has saved is whole in {folder}. {remedy} push it: {again}"


def _failure(error: BaseException) -> BaseException | None:
    """The transport's error in `error` or among its causes: an upload of a large file wraps it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _TRANSPORT):
        cause = cause.__cause__
    return cause
