"""CPU matrices packed once for oneDNN, instead of being laid out anew for every product.

For bfloat16 on a CPU the packed product gives the same bits as torch's own and reads weights about a third faster, up
to some hundred tokens per step (`python bench/cpu_linear.py`); reading weights is what bounds decoding. `CpuBackend`
uses it where there are AMX or no AVX512-BF16 instructions; elsewhere `engine.cpu.products` is faster. Float32 stays
as it is: there oneDNN sums in another order, and exactness is what float32 is for.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from engine.backend import Linear, TorchBackend


class PackedBackend(TorchBackend):
    """`TorchBackend` with bfloat16 matrices in oneDNN's own layout."""

    packs: ClassVar[bool] = True

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Pack a bfloat16 matrix; others are taken over unpacked. A packed tied embedding is a second copy of it."""
        if weight.dtype is not torch.bfloat16:
            return super().linear(weight, bias)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001 - what torch.compile uses; no public name

        def product(hidden: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")  # noqa: SLF001
            return out

        return product


def can_pack(device: torch.device) -> bool:
    """Whether this build of torch packs bfloat16 matrices on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - no public name
