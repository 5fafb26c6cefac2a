"""How many tokens each prompt and each output gets: a number, a range or a distribution."""

import math

import msgspec
import numpy as np

from loadtest.errors import BadArgument


class Lengths(msgspec.Struct, frozen=True):
    """A distribution over whole token counts, all at least ``low`` and at most ``high``.

    ``kind`` is ``fixed``, ``uniform`` (both ends included), ``normal`` (``centre`` = mean, ``spread`` =
    standard deviation, tokens) or ``lognormal`` (``centre`` = median in tokens, ``spread`` = sigma of the
    logarithm, no unit). Draws outside ``[low, high]`` are moved to the nearer end.
    """

    kind: str
    low: int
    high: int
    centre: float = 0.0
    spread: float = 0.0

    def draw(self, rng: np.random.Generator) -> int:
        """Return one length in tokens. Mutates: ``rng``."""
        if self.kind == "fixed":
            return self.low
        if self.kind == "uniform":
            return int(rng.integers(self.low, self.high, endpoint=True))
        if self.kind == "normal":
            value = rng.normal(self.centre, self.spread)
        else:
            value = self.centre * math.exp(rng.normal(0.0, self.spread))
        return int(min(max(round(value), self.low), self.high))


def parse_lengths(option: str, text: str) -> Lengths:
    """Read ``128``, ``64:512``, ``normal:MEAN:STD[:MIN:MAX]`` or ``lognormal:MEDIAN:SIGMA[:MIN:MAX]``.

    Without MIN and MAX a distribution is held between 1 and 8 times its centre.
    Raises: BadArgument naming ``option``.
    """
    parts = text.split(":")
    try:
        if parts[0] in {"normal", "lognormal"} and len(parts) in {3, 5}:
            centre, spread = float(parts[1]), float(parts[2])
            low, high = (int(parts[3]), int(parts[4])) if len(parts) == 5 else (1, math.ceil(8 * centre))
            lengths = Lengths(parts[0], low, high, centre, spread)
        elif len(parts) == 1:
            lengths = Lengths("fixed", int(text), int(text))
        elif len(parts) == 2:
            lengths = Lengths("uniform", int(parts[0]), int(parts[1]))
        else:
            raise BadArgument(option, _usage(text))
    except (ValueError, OverflowError) as error:
        raise BadArgument(option, _usage(text)) from error
    if not 1 <= lengths.low <= lengths.high:
        raise BadArgument(option, f"{text!r} needs 1 <= MIN <= MAX")
    if lengths.centre < 0 or lengths.spread < 0 or not math.isfinite(lengths.centre + lengths.spread):
        raise BadArgument(option, f"{text!r} needs a positive centre and a spread that is not negative")
    return lengths


def _usage(text: str) -> str:
    return (
        f"cannot read {text!r}; give tokens as 128, 64:512, normal:MEAN:STD[:MIN:MAX] "
        "or lognormal:MEDIAN:SIGMA[:MIN:MAX]"
    )
