"""A checkpoint's tensors into a model's: stacked, FP8 ones handed over or dequantised, page scales folded in."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

import torch

from engine.backend import Backend, HeadNorms, Linear
from engine.fp8 import quantise_channels
from engine.fp8_checkpoint import Part, is_fp8, page_scales, read_fp8
from engine.model_config import ModelConfig
from engine.rope import Rotary
from engine.transformer import Layer, Transformer
from engine.weights import TensorSource

_EMBEDDING = Part("model.embed_tokens")


class WeightLoader:
    """Builds a `Transformer` out of an open checkpoint, one matrix at a time.

    Args:
        config: of the model.
        checkpoint: checked against `config`.
        dtype: of whatever is not FP8.
        device: for all of it.
        backend: takes the matrices over.
        quantization: what unquantized matrices become, the vocabulary head aside: `fp8`, `int8` where the backend
            rounds, or `auto`, what they are.
        scales_pages: multiply the weights around attention so that pages hold keys and values over their scales.

    Attributes:
        weight_bytes: memory that the weights take, mapped embedding included.
        num_fp8: matrices whose products are made in FP8. num_int8: those rounded to 8 bits.
        num_widened: FP8 matrices that were dequantised instead.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
        *,
        quantization: str = "auto",
        scales_pages: bool = False,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._backend = backend
        self._quantization = quantization
        self._scales_pages = scales_pages
        self.weight_bytes = 0
        self.num_fp8 = 0
        self.num_int8 = 0
        self.num_widened = 0

    def transformer(self) -> Transformer:
        """The whole model."""
        config = self._config
        if config.tie_word_embeddings and not self._backend.packs:
            embedding = self._kept(_EMBEDDING)
            head = self._backend.linear(embedding, None)
        else:
            embedding = self._mapped(_EMBEDDING)
            head = self._linear(False, _EMBEDDING if config.tie_word_embeddings else Part("lm_head"), quantises=False)
        return Transformer(
            config=config,
            backend=self._backend,
            embedding=embedding,
            layers=tuple(self._layer(index) for index in range(config.num_layers)),
            final_norm=self._kept(Part("model.norm")),
            lm_head=head,
            rotary=Rotary(config.rope, self._device),
        )

    def _layer(self, index: int) -> Layer:
        config = self._config
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        key_scale, value_scale = page_scales(self._checkpoint, index) if self._scales_pages else (1.0, 1.0)
        in_norm, in_matrix = (key_scale, 1.0) if config.qk_norm else (1.0, key_scale)  # a norm would undo it
        qkv = (
            Part(f"{attention}.q_proj", in_matrix, in_matrix),
            Part(f"{attention}.k_proj", 1 / in_matrix, 1 / in_matrix),
            Part(f"{attention}.v_proj", 1 / value_scale, 1 / value_scale),
        )
        return Layer(
            qkv=self._linear(config.qkv_bias, *qkv),
            output=self._linear(config.o_bias, Part(f"{attention}.o_proj", value_scale)),
            gate_up=self._linear(config.mlp_bias, Part(f"{mlp}.gate_proj"), Part(f"{mlp}.up_proj")),
            down=self._linear(config.mlp_bias, Part(f"{mlp}.down_proj")),
            attention_norm=self._kept(Part(f"{prefix}.input_layernorm")),
            mlp_norm=self._kept(Part(f"{prefix}.post_attention_layernorm")),
            head_norms=HeadNorms(
                self._kept(Part(f"{attention}.q_norm", in_norm)),
                self._kept(Part(f"{attention}.k_norm", 1 / in_norm)),
                config.rms_norm_eps,
            )
            if config.qk_norm
            else None,
            window=config.layer_windows[index],
        )

    def _linear(self, has_bias: bool, *parts: Part, quantises: bool = True) -> Linear:
        """One product for several matrices of equal width, their rows stacked."""
        bias = self._kept(*parts, kind="bias") if has_bias else None
        matrix = read_fp8(self._checkpoint, parts, self._config.quantization, self._device)
        if matrix is None:
            becomes = self._quantization if quantises else "auto"
            if becomes != "fp8":
                self.num_widened += sum(is_fp8(self._checkpoint, part.name) for part in parts)
                self.num_int8 += becomes == "int8"
                return self._take_over(parts, lambda: self._matrix(*parts), bias, rounded=becomes == "int8")
            matrix = quantise_channels(self._stack(*parts))
        product = self._backend.fp8_linear(matrix, bias, self._dtype)
        if product is not None:
            self.num_fp8 += 1
            self.weight_bytes += matrix.num_bytes
            return product
        self.num_widened += 1
        return self._take_over(parts, lambda: matrix.dequantised(self._dtype), bias)

    def _take_over(
        self, parts: Many[Part], read: Callable[[], torch.Tensor], bias: torch.Tensor | None, *, rounded: bool = False
    ) -> Linear:
        """The backend's product of a matrix of the model's dtype, which it may hold already."""
        name = "+".join(part.name for part in parts)
        product, num_bytes = self._backend.named_linear(name, read, bias, rounded=rounded)
        self.weight_bytes += num_bytes
        return product

    def _kept(self, *parts: Part, kind: str = "weight") -> torch.Tensor:
        """Stacked tensors that stay as they are."""
        stacked = self._stack(*parts, kind=kind)
        self.weight_bytes += stacked.nbytes
        return stacked

    def _matrix(self, *parts: Part) -> torch.Tensor:
        """Stacked; but a backend that packs can as well be given what is mapped."""
        if len(parts) == 1 and self._backend.packs:
            return self._read(parts[0], "weight").to(self._dtype)
        return self._stack(*parts)

    def _stack(self, *parts: Part, kind: str = "weight") -> torch.Tensor:
        """Tensors one below the other in new memory of the model's dtype and device, FP8 ones dequantised."""
        shapes = [self._checkpoint.tensors[f"{part.name}.{kind}"].shape for part in parts]
        rows = sum(shape[0] for shape in shapes)
        stacked = torch.empty((rows, *shapes[0][1:]), dtype=self._dtype, device=self._device)
        top = 0
        for part, shape in zip(parts, shapes, strict=True):
            stacked[top : top + shape[0]].copy_(self._read(part, kind))
            top += shape[0]
        return stacked

    def _read(self, part: Part, kind: str) -> torch.Tensor:
        """One tensor, multiplied; mapped where neither that nor dequantising makes a copy."""
        if kind == "weight" and is_fp8(self._checkpoint, part.name):
            matrix = read_fp8(self._checkpoint, [part], self._config.quantization, torch.device("cpu"))
            assert matrix is not None  # noqa: S101 - one part always stacks
            return matrix.dequantised(self._dtype)
        factor = part.factor if kind == "weight" else part.bias_factor
        tensor = self._checkpoint.read(f"{part.name}.{kind}")
        return tensor if factor == 1 else tensor * factor

    def _mapped(self, part: Part) -> torch.Tensor:
        """The tensor in the page cache if it can be used as it is, else a copy."""
        tensor = self._checkpoint.map_alone(f"{part.name}.weight")
        if tensor.dtype != self._dtype or self._device.type != "cpu":
            return self._kept(part)
        self.weight_bytes += tensor.nbytes
        return tensor
