"""PageRank on attention: how much of a uniform mass a token holds after some steps along what tokens attend to."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: transition probabilities that are kept between steps; more are computed again in each step
BLOCK_BYTES = 256 << 20
ROWS = 256


def attention_pagerank(
    queries: Float[Tensor, "B H S d"],
    keys: Float[Tensor, "B G S d"],
    valid: Bool[Tensor, "B S"],
    *,
    temperature: float = 1.0,
    steps: int = 5,
    scale: float | None = None,
) -> Float[Tensor, "B S"]:
    """sqrt(mean over heads of p^2) after `steps` steps p <- p M from a uniform p, without damping (float32).

    M is the causal softmax of scale q . k / temperature. `ROWS` rows of it are made at a time, and [B, H, S, S] is
    stored only where it is small.

    Args:
        keys: may have fewer heads (grouped queries).
        valid: which tokens are no padding; others neither give nor receive.
        scale: of the logits; None: d ** -0.5.

    Example:
        >>> attention_pagerank(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.tensor([[True, True]]), steps=1)
        tensor([[0.7500, 0.2500]])
    """
    batch, heads, length, width = queries.shape
    factor = (width**-0.5 if scale is None else scale) / temperature
    keys = keys.float().repeat_interleave(heads // keys.shape[1], dim=1).transpose(2, 3)
    order = torch.arange(length, device=queries.device)
    starts = range(0, length, ROWS)

    def block(start: int) -> Tensor:
        rows = slice(start, start + ROWS)
        hidden = (order > order[rows, None]) | ~valid[:, None, None]
        logits = (queries[:, :, rows].float() @ keys * factor).masked_fill(hidden, -torch.inf)
        # rows in front of all tokens see nothing
        return logits.softmax(dim=-1).masked_fill(hidden, 0)

    fits = 4 * batch * heads * length * length <= BLOCK_BYTES
    stored = {start: block(start) for start in starts} if fits else {}
    share = (valid / valid.sum(dim=1, keepdim=True).clamp(min=1))[:, None].expand(-1, heads, -1)
    for _ in range(steps):
        moved = torch.zeros_like(share)
        for start in starts:
            transition = stored[start] if fits else block(start)
            moved = moved + (share[:, :, None, start : start + ROWS] @ transition)[:, :, 0]
        share = moved
    return share.square().mean(dim=1).sqrt()
