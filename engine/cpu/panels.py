"""Matrices packed in panels of 32 outputs, as products read them from end to end: plain, or in 12 or 8 bits a weight.

A panel is a sequence of records, one for each two inputs: the 32 pairs of weights that the outputs have for them. A
bfloat16 is a sign, 8 bits of exponent and 7 of fraction; but the weights of a trained or drawn matrix lie within a few
powers of two, so that 4 bits tell the exponents of a panel apart, counted from its lowest. The few weights out of that
reach are exceptions, kept beside and put in place when their record is expanded. Nothing is lost: what is expanded is
the plain record, bit by bit, while a quarter less is read from memory, which is what bounds decoding.

A record in 12 bits: 64 bytes of signs and fractions in the order of the plain record's weights, then 32 bytes, each
with the exponent of a weight of the first half in its low bits and of its counterpart in the second half in its high.

In 8 bits a weight is rounded: to a whole number from -127 to 127, of which the largest stands for the largest of its
output, whose scale multiplies the sum. A record is 64 such numbers: of outputs 0 to 15 first those of the even input,
then those of the odd one, and the same of outputs 16 to 31.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
import torch
from numba import carray
from torch.nn import functional

from engine.cpu.jit import Team, kernel, num_threads, pointer, thread_num
from engine.cpu.packed import Packed
from engine.cpu.tiles import LANES

PANEL: Final = 32
"""Outputs of a panel: two vectors of pairs."""
RECORD_WEIGHTS: Final = 2 * PANEL
PLAIN: Final = "bf16 pairs"
TWELVE_BITS: Final = "bf16 pairs in 12 bits"
EIGHT_BITS: Final = "int8 pairs"
RECORD_BYTES: Final = {PLAIN: 2 * RECORD_WEIGHTS, TWELVE_BITS: 3 * RECORD_WEIGHTS // 2, EIGHT_BITS: RECORD_WEIGHTS}
BLOCK_RECORDS: Final = 128
"""Expanded at once at most. As many lie behind the last panel: who expands a block does not ask where it ends."""

_ALIGNMENT = 64
_EXPONENTS = 16
_LARGEST = 127
_MOST_EXCEPTIONS = 2**-8
"""Of all weights; a matrix with more stays plain. Of weights from a normal distribution about 2 ** -13 are."""


def pack(weight: torch.Tensor, team: Team) -> Packed:
    """A bf16 matrix `[N, K]`, copied; rounded up to whole panels and pairs with zeros.

    The arrays: `panels`, uint8, the records. In 12 bits also `lowest`, int64 `[panels]`, each panel's lowest exponent;
    `exceptions`, int64, a weight's number in its panel times 2 ** 16 plus its bits, in order; `starts`, int64
    `[panels + 1]`, where each panel's exceptions begin.
    """
    num_outputs, num_inputs = weight.shape
    padded = functional.pad(weight, (0, num_inputs % 2, 0, -num_outputs % PANEL)).contiguous()
    num_panels, num_pairs = padded.shape[0] // PANEL, padded.shape[1] // 2
    lowest, counts = torch.empty(2, num_panels, dtype=torch.int64)
    look, compact = _packers()
    words = (padded.data_ptr(), lowest.data_ptr(), counts.data_ptr(), num_panels, num_pairs)
    team.run(look, words, weight.numel())
    starts = functional.pad(counts.cumsum(0), (1, 0))
    num_exceptions = int(starts[-1])
    shape = (num_outputs, num_inputs)
    if num_exceptions > _MOST_EXCEPTIONS * padded.numel():
        panels = _aligned(padded.nbytes)
        records = panels.view(torch.int32).view(num_panels, num_pairs, PANEL)
        records.copy_(padded.view(torch.int32).view(num_panels, PANEL, num_pairs).transpose(1, 2))
        return Packed(PLAIN, shape, {"panels": panels})
    panels = _aligned((num_panels * num_pairs + BLOCK_RECORDS) * RECORD_BYTES[TWELVE_BITS])
    panels[num_panels * num_pairs * RECORD_BYTES[TWELVE_BITS] :] = 0
    exceptions = torch.empty(num_exceptions, dtype=torch.int64)
    arrays = {"panels": panels, "lowest": lowest, "exceptions": exceptions, "starts": starts}
    addresses = (array.data_ptr() for array in arrays.values())
    team.run(compact, (padded.data_ptr(), *addresses, num_panels, num_pairs), weight.numel())
    return Packed(TWELVE_BITS, shape, arrays)


def rounded_by_output(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a matrix `[N, K]` becomes in 8 bits: whole numbers, int8 `[N, K]`, and their scales, float32 `[N]`."""
    wide = weight.float()
    scales = wide.abs().amax(1) / _LARGEST
    numbers = (wide / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).round_().to(torch.int8)
    return numbers, scales


def pack_int8(weight: torch.Tensor) -> Packed:
    """A matrix `[N, K]` rounded to 8 bits, rounded up to whole panels and pairs with zeros.

    The arrays: `panels`, uint8, the records; `scales`, float32 `[N]`.
    """
    num_outputs, num_inputs = weight.shape
    numbers, scales = rounded_by_output(weight)
    padded = functional.pad(numbers, (0, num_inputs % 2, 0, -num_outputs % PANEL))
    num_panels, num_pairs = padded.shape[0] // PANEL, padded.shape[1] // 2
    panels = _aligned((num_panels * num_pairs + BLOCK_RECORDS) * RECORD_WEIGHTS)
    panels[padded.numel() :] = 0
    records = panels[: padded.numel()].view(torch.int8).view(num_panels, num_pairs, 2, 2, LANES)
    records.copy_(padded.view(num_panels, 2, LANES, num_pairs, 2).permute(0, 3, 1, 4, 2))
    return Packed(EIGHT_BITS, (num_outputs, num_inputs), {"panels": panels, "scales": scales})


def _aligned(num_bytes: int) -> torch.Tensor:
    memory = torch.empty(num_bytes + _ALIGNMENT, dtype=torch.uint8)
    skipped = -memory.data_ptr() % _ALIGNMENT
    return memory[skipped : skipped + num_bytes]


@functools.cache
def _packers() -> tuple[Any, Any]:
    """Two kernels over padded weights `[32 * panels, 2 * pairs]`: one looks at exponents, one writes records.

    Words of the first: addresses of weights, of `lowest`, of how many exceptions each panel has; panels; pairs. Of the
    second: addresses of weights, records, `lowest`, `exceptions`, `starts`; panels; pairs.
    """
    record_bytes = RECORD_BYTES[TWELVE_BITS]

    def look(words: Any) -> None:
        num_panels, num_pairs = words[3], words[4]
        size = RECORD_WEIGHTS * num_pairs
        lowest = carray(pointer(words[1]), num_panels, np.int64)
        counts = carray(pointer(words[2]), num_panels, np.int64)
        members, member = num_threads(), thread_num()
        seen = np.empty(256, np.int64)
        for panel in range(num_panels * member // members, num_panels * (member + 1) // members):
            seen[:] = 0
            for weight in carray(pointer(words[0] + 2 * size * panel), size, np.uint16):
                seen[(weight >> 7) & 255] += 1
            within = np.sum(seen[:_EXPONENTS])
            most, first = within, np.int64(0)
            for exponent in range(1, 256 - _EXPONENTS + 1):
                within += seen[exponent + _EXPONENTS - 1] - seen[exponent - 1]
                if within > most:
                    most, first = within, np.int64(exponent)
            lowest[panel] = first
            counts[panel] = size - most

    def compact(words: Any) -> None:
        num_panels, num_pairs = words[5], words[6]
        lowest = carray(pointer(words[2]), num_panels, np.int64)
        starts = carray(pointer(words[4]), num_panels + 1, np.int64)
        exceptions = carray(pointer(words[3]), starts[num_panels], np.int64)
        members, member = num_threads(), thread_num()
        for panel in range(num_panels * member // members, num_panels * (member + 1) // members):
            rows = (PANEL, 2 * num_pairs)
            weights = carray(pointer(words[0] + 2 * RECORD_WEIGHTS * num_pairs * panel), rows, np.uint16)
            records = carray(pointer(words[1] + record_bytes * num_pairs * panel), (num_pairs, record_bytes), np.uint8)
            least, exception = lowest[panel], starts[panel]
            for pair in range(num_pairs):
                for at in range(RECORD_WEIGHTS):
                    weight = np.int64(weights[at // 2, 2 * pair + at % 2])
                    code = ((weight >> 7) & 255) - least
                    if code < 0 or code >= _EXPONENTS:
                        exceptions[exception] = (pair * RECORD_WEIGHTS + at) << 16 | weight
                        exception += 1
                        code = 0
                    records[pair, at] = (weight >> 8 & 0x80) | (weight & 0x7F)
                    if at < PANEL:
                        records[pair, RECORD_WEIGHTS + at] = code
                    else:
                        records[pair, RECORD_WEIGHTS + at - PANEL] |= code << 4

    return kernel(look), kernel(compact)
