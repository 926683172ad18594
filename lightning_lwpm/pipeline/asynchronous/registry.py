"""Corrections by the name that users write."""

import functools
from collections.abc import Callable

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.asynchronous.anticipation import Anticipation
from lightning_lwpm.pipeline.asynchronous.combined import Combined
from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.discount import Discount
from lightning_lwpm.pipeline.asynchronous.error_feedback import ErrorFeedback
from lightning_lwpm.pipeline.asynchronous.look_ahead import LookAhead
from lightning_lwpm.pipeline.asynchronous.momentum import Momentum
from lightning_lwpm.pipeline.asynchronous.prediction import Prediction
from lightning_lwpm.pipeline.asynchronous.stash import Stash

__all__ = ["CORRECTIONS", "DEFAULT", "correction"]

CORRECTIONS: dict[str, Callable[..., Correction]] = {
    kind.name: kind
    for kind in (Correction, ErrorFeedback, LookAhead, Momentum, Prediction, Anticipation, Discount, Stash)
}
"""All corrections by name; each is called with (optimizer, parameters, delay)."""

DEFAULT = "look_ahead+discount"
"""Look-ahead was best in all measurements; the discount, which is for delays above one step, is less well tried."""


def correction(name: str) -> Callable[..., Correction]:
    """The correction of that name, or several in one, ``"look_ahead+discount"``.

    Raises:
        ConfigurationError: There is none.
    """
    kinds = []
    for part in name.split("+"):
        if part not in CORRECTIONS:
            raise ConfigurationError(
                f"staleness_correction={name!r} is not known; choose one of {', '.join(map(repr, CORRECTIONS))}, or "
                f"several joined by '+', such as {DEFAULT!r}."
            )
        kinds.append(CORRECTIONS[part])
    return kinds[0] if len(kinds) == 1 else functools.partial(Combined, kinds=kinds)
