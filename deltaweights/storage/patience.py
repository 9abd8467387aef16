"""Waits for what others do, up to a time limit, or for as long as it makes progress."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from typing import TypeVar

from ..errors import HubReadError

Result = TypeVar("Result")


def within(
    seconds: float,
    action: Callable[[], Result],
    *,
    what: str,
    progress: Callable[[], object] = lambda: None,
    late: Callable[[Result], object] = lambda result: None,
) -> Result:
    """Run ``action`` in a thread of its own, and give it up if it does not end in time. (The HTTP library's
    timeouts do not bound an answer of which a byte comes now and then.)

    Args:
        seconds: how long it may take. If ``progress`` gives something new by then, it may take as long again.
        what: what does not end, for the error.
        progress: says how far the action is.
        late: is given a result that comes after all.

    Returns:
        What ``action`` returns.

    Raises:
        HubReadError: it took too long. Also raises what ``action`` raises.
    """
    done: Future[Result] = Future()

    def work() -> None:
        try:
            result = action()
        except BaseException as error:
            with suppress(InvalidStateError):  # given up
                done.set_exception(error)
            return
        try:
            done.set_result(result)
        except InvalidStateError:
            late(result)

    before = progress()
    threading.Thread(target=work, name="deltaweights-hub", daemon=True).start()
    try:
        while not wait([done], seconds).done:
            now = progress()
            if now == before:
                raise does_not_end(what, f"nothing came of it in {seconds:,.0f} seconds")
            before = now
        return done.result()
    finally:
        done.cancel()


def does_not_end(what: str, why: str, *, retryable: bool = True) -> HubReadError:
    """The error of something that was given up."""
    from huggingface_hub import constants

    return HubReadError(
        f"{what} {constants.ENDPOINT} does not end",
        f"{why[0].upper()}{why[1:]}.",
        "Check HF_ENDPOINT, and the proxy if there is one; or try again later.",
        retryable=retryable,
    )
