"""Prompt-to-Prompt as in InstructPix2Pix: the two images of a pair share the attention maps of self-attention.

In the code of the paper (2211.09800, section 3.1.2), the logits q k of the second image are replaced by those of the
first before the softmax, in all self-attention layers, while each image keeps its own values v; cross-attention is
unchanged. softmax(q0 k0) v1 needs no explicit attention map: the second image takes q and k of the first, and the fused
attention of PyTorch computes the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention


@dataclass
class AttentionSources:
    """rows: (B,) index of the row of the UNet batch that provides the queries and keys of each row; None: itself."""

    rows: torch.Tensor | None = None

    def set(self, is_shared: list[bool], num_branches: int, device: torch.device | str = "cpu") -> None:
        """Share within those of the P pairs that are marked.

        The UNet batch has the 2P rows first, second, first, second ... of the pairs, `num_branches` times (2 with
        classifier-free guidance, else 1).
        """
        if not any(is_shared):
            self.rows = None
            return
        rows = torch.arange(2 * len(is_shared) * num_branches)
        marks = torch.tensor(is_shared).repeat_interleave(2).repeat(num_branches)
        self.rows = torch.where(marks, rows // 2 * 2, rows).to(device)


class SharedSelfAttention:
    """An attention processor with shared queries and keys in self-attention; otherwise the original processor."""

    def __init__(self, sources: AttentionSources, original: Any) -> None:
        self.sources, self.original = sources, original

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, temb: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        rows = self.sources.rows
        if rows is None or kwargs.get("encoder_hidden_states") is not None:
            return self.original(attn, hidden_states, temb=temb, **kwargs)
        assert kwargs.get("attention_mask") is None and len(rows) == len(hidden_states), "one source per row, no mask"
        return _attend(attn, hidden_states, rows)


def _attend(attn: Attention, hidden_states: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """The AttnProcessor2_0 of diffusers for self-attention, but with q and k of the rows `sources` (B,)."""
    residual, shape = hidden_states, hidden_states.shape
    if len(shape) == 4:  # a separate attention block, as in AttnDownBlock2D: (B, C, h, w) -> (B, h * w, C)
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

    def split_heads(projected: torch.Tensor) -> torch.Tensor:  # (B, N, H * D) -> (B, H, N, D)
        return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    query, key, value = (split_heads(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v))
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    attended = F.scaled_dot_product_attention(query[sources], key[sources], value)  # (B, H, N, D)
    attended = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))  # projection, dropout
    if len(shape) == 4:
        attended = attended.transpose(1, 2).reshape(shape)
    if attn.residual_connection:
        attended = attended + residual
    return attended / attn.rescale_output_factor


@contextmanager
def shared_self_attention(unet: UNet2DConditionModel) -> Iterator[AttentionSources]:
    """Within the context, the self-attention of the UNet follows the `AttentionSources` that it yields."""
    original, sources = unet.attn_processors, AttentionSources()
    unet.set_attn_processor({name: SharedSelfAttention(sources, each) for name, each in original.items()})
    try:
        yield sources
    finally:
        unet.set_attn_processor(original)


def count_shared_steps(threshold: float, num_steps: int) -> int:
    """The number of shared steps, always the first ones: as in the paper, those with threshold > i / (num_steps - 1).

    num_steps: at least 2.
    """
    return sum(threshold > step / (num_steps - 1) for step in range(num_steps))
