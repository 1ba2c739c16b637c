"""Prompt-to-Prompt as InstructPix2Pix uses it: a pair's two images share the attention maps of their self-attention.

In the paper's code (2211.09800, section 3.1.2) the logits q k of the second image are replaced by those of the first
before the softmax, in every self-attention layer, at every resolution, and each image keeps its own values v.
Cross-attention stays as it is. softmax(q0 k0) v1 needs no attention map: the second image takes q and k of the first,
and attention is the usual fused one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention


class Sharing:
    """Which row of the UNet's batch each row takes queries and keys from; None: each from itself."""

    def __init__(self) -> None:
        self.sources: torch.Tensor | None = None  # (B,) row numbers

    def set(self, is_shared: list[bool], num_branches: int, device: torch.device | str = "cpu") -> None:
        """Share within those of the P pairs that are marked.

        The UNet's batch is `num_branches` times (1 without, 2 with classifier-free guidance) the 2P rows
        first, second, first, second ... of the pairs.
        """
        if not any(is_shared):
            self.sources = None
            return
        rows = torch.arange(2 * len(is_shared) * num_branches)
        marks = torch.tensor(is_shared).repeat_interleave(2).repeat(num_branches)
        self.sources = torch.where(marks, rows // 2 * 2, rows).to(device)


class SharedSelfAttention:
    """An attention processor that follows a `Sharing` in self-attention, and is the former one in all else."""

    def __init__(self, sharing: Sharing, former: Any) -> None:
        self.sharing, self.former = sharing, former

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        sources = self.sharing.sources
        if sources is None or encoder_hidden_states is not None:
            return self.former(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **settings)
        assert attention_mask is None and len(sources) == len(hidden_states), "one source for each row, and no mask"
        return _attend(attn, hidden_states, sources)


def _attend(attn: Attention, hidden_states: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Self-attention with q and k of the rows `sources` (B,): as diffusers' AttnProcessor2_0 but for that."""
    residual, shape = hidden_states, hidden_states.shape
    if len(shape) == 4:  # an attention block of its own, as in AttnDownBlock2D: (B, C, h, w) -> (B, h * w, C)
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
def sharing_self_attention(unet: UNet2DConditionModel) -> Iterator[Sharing]:
    """Inside, the UNet's self-attention follows the `Sharing` that is yielded; outside it is as it was."""
    former, sharing = unet.attn_processors, Sharing()
    unet.set_attn_processor({name: SharedSelfAttention(sharing, each) for name, each in former.items()})
    try:
        yield sharing
    finally:
        unet.set_attn_processor(former)


def count_shared_steps(threshold: float, num_steps: int) -> int:
    """The reference's rule as a number of steps: step i is shared while `threshold > i / (num_steps - 1)`.

    The shared steps are always the first ones. Needs two steps at least.
    """
    return sum(threshold > step / (num_steps - 1) for step in range(num_steps))
