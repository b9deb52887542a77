"""What the last batch of images did in a compressed encoder."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vtc.errors import InputError
from vtc.indices import take
from vtc.tokenmap import TokenMap
from vtc.tokens import Layout


@dataclass(frozen=True, eq=False)
class EncoderReport:
    """One batch of images through a patched encoder.

    Args:
        spec: the methods, as a spec string.
        encoder: class and library of the encoder.
        patches: patches of each image.
        prefix: [CLS], distillation and register tokens, which always stay; no other figure here counts them but FLOPs.
        per_block: tokens of each image behind each block.
        selection_ms: site -> milliseconds spent deciding and applying.
        flops_dense, flops: FLOPs of the blocks, uncompressed and compressed, summed over the images (2 x
            multiply-accumulates; padding of batches with different numbers of tokens is not counted).
        token_map: patches -> tokens that are left at the end, in raster order, one group per image.
        layout: places of the patches; None where they are no grid (patch dropout).
    """

    spec: str
    encoder: str
    patches: tuple[int, ...]
    prefix: int
    per_block: tuple[tuple[int, ...], ...]
    selection_ms: dict[str, float]
    flops_dense: int
    flops: int
    token_map: TokenMap
    layout: Layout | None

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each image behind the last block."""
        return self.per_block[-1]

    @property
    def sizes(self) -> Float[Tensor, "B K"]:
        """Patches that each of the tokens stands for; 0 in padding."""
        sizes = self.token_map.sizes()
        return sizes.masked_fill(self.token_map.anchor < 0, 0)

    def gather(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B K D"]:
        """The tokens that are left, each once, out of an output of the encoder with a row for every patch.

        Args:
            x: an output of the same call, [B, N, D] with or without the prefix in front of the patches.

        Raises:
            InputError: another number of images or rows.
        """
        images, patches = len(self.patches), self.patches[0]
        if x.shape[0] != images or x.shape[1] not in (patches, patches + self.prefix):
            raise InputError(
                f"gather needs an output of the last call, [{images}, {patches} or {patches + self.prefix}, D], "
                f"not {tuple(x.shape)}."
            )
        anchor = self.token_map.anchor
        rows = x[:, x.shape[1] - patches :]
        return take(rows, anchor).masked_fill((anchor < 0)[..., None], 0)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data (the map and the layout are left out)."""
        data = {k: v for k, v in vars(self).items() if k not in ("token_map", "layout")}
        return {**data, "tokens": self.tokens}

    def __str__(self) -> str:
        def span(values: tuple[int, ...]) -> str:
            low, high = min(values), max(values)
            return str(low) if low == high else f"{low}..{high}"

        lines = [
            f"{self.spec} on {self.encoder}, {len(self.patches)} image(s)",
            f"  patches            {span(self.patches)} (and {self.prefix} prefix)",
            f"  behind each block  {' '.join(span(block) for block in self.per_block)}",
            f"  FLOPs of blocks    {self.flops_dense / 1e9:.2f} G -> {self.flops / 1e9:.2f} G "
            f"({self.flops / self.flops_dense:.1%})",
            f"  selection          {sum(self.selection_ms.values()):.2f} ms",
        ]
        return "\n".join(lines)
