"""Clusters by density peaks: centres are dense and far from anything denser."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vtc.primitives.ranking import ranks
from vtc.primitives.selection import valid_prefix


def density_peaks(
    x: Float[Tensor, "B N D"],
    mask: Bool[Tensor, "B N"],
    counts: Sequence[int],
    *,
    neighbours: Sequence[int],
    noise: Float[Tensor, "B N"] | None = None,
) -> tuple[Int[Tensor, "B C"], Int[Tensor, "B N"]]:
    """Centres and clusters of DPC-KNN (density peaks over nearest neighbours).

    Density is exp(-mean squared distance to the `neighbours[b]` nearest tokens, the token itself included); distances
    are Euclidean, divided by sqrt(D). The `counts[b]` tokens with the largest density times distance to the nearest
    denser token (the largest distance of the group where none is denser) are the centres, and each token goes to the
    nearest of them. Equal densities: the earlier token counts as denser. The distances of a group are stored,
    [B, N, N].

    Args:
        noise: added to the densities, for code that breaks ties by chance.

    Returns:
        Centres by descending score, -1 last, and the number of the centre of each token, -1 in padding.

    Example:
        >>> x = torch.tensor([[[0.0], [0.1], [5.0], [5.1], [5.2]]])
        >>> centers, cluster = density_peaks(x, x[..., 0] >= 0, [2], neighbours=[2])
        >>> sorted(centers[0].tolist()), cluster[0].tolist()
        ([0, 2], [1, 1, 0, 0, 0])
    """
    x, width = x.float(), x.shape[1]
    if not width or not max(counts):
        none = torch.full((x.shape[0], width), -1, device=x.device)
        return none[:, :0], none
    # through a matrix product, equal vectors would not be at distance 0
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") * x.shape[2] ** -0.5
    distance = distance.masked_fill(~mask[:, None], torch.inf)
    near = distance.sort(dim=2).values.square()
    among = valid_prefix(neighbours, width, x.device)[:, None]
    count = torch.tensor(list(neighbours), device=x.device)[:, None]
    density = -near.masked_fill(~among, 0).sum(dim=2) / count.clamp(min=1)  # its logarithm: states may be far apart
    if noise is not None:
        density = (density.exp() + noise).log()
    place = ranks(density, mask)
    denser = place[:, None] < place[..., None]
    farthest = distance.masked_fill(~(mask[:, None] & mask[..., None]), 0).flatten(1).amax(dim=1)[:, None]
    delta = distance.masked_fill(~denser, torch.inf).amin(dim=2)
    score = density + torch.where(place == 0, farthest, delta).log()
    order = score.masked_fill(~mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    centers = order[:, : max(counts)]
    centers = centers.masked_fill(~valid_prefix(counts, centers.shape[1], x.device), -1)
    to_center = distance.gather(2, centers.clamp(min=0)[:, None].expand(-1, width, -1))
    cluster = to_center.masked_fill((centers < 0)[:, None], torch.inf).argmin(dim=2)
    # among equal tokens a centre keeps to itself
    number = torch.arange(centers.shape[1], device=x.device).expand_as(centers)
    own = torch.where(centers < 0, width, centers)
    cluster = torch.nn.functional.pad(cluster, (0, 1)).scatter(1, own, number)[:, :width]
    return centers, cluster.masked_fill(~mask, -1)
