"""How many visual tokens remain. Free of torch, so that a command line can refuse a wrong budget at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from vtc.errors import BudgetError

PER = ("image", "tile", "frame", "video", "sample")


@dataclass(frozen=True)
class Budget:
    """How many visual tokens remain, and what that number counts.

    Args:
        tokens: tokens that remain in each `per`; exactly one of `tokens` and `ratio` is given.
        ratio: share that is *kept*, in (0, 1]; the count is Python's `round(ratio * N)`, at least 1.
        per: the unit that the number counts: "image", "tile", "frame", "video" or "sample".

    Raises:
        BudgetError: neither or both numbers, a number out of range, or float and int mixed up.

    Example:
        >>> Budget(tokens=64).resolve((576, 40))
        (64, 40)
        >>> Budget(ratio=0.5).resolve((81,))
        (40,)
    """

    tokens: int | None = None
    ratio: float | None = None
    per: str = "image"

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.ratio is None):
            raise BudgetError(
                f"Budget(tokens={self.tokens}, ratio={self.ratio}): give exactly one, e.g. Budget(tokens=64)."
            )
        if self.tokens is not None:
            if isinstance(self.tokens, bool) or not isinstance(self.tokens, int):
                raise BudgetError(f"budget tokens={self.tokens!r} is not an integer. Use tokens=64, or ratio=0.11.")
            if self.tokens < 1:
                raise BudgetError(f"budget tokens={self.tokens}: at least 1 token must stay. Use tokens >= 1.")
        if self.ratio is not None:
            if isinstance(self.ratio, bool) or not isinstance(self.ratio, float):
                raise BudgetError(f"budget ratio={self.ratio!r} is not a float. Use ratio=0.25, or tokens=64.")
            if not 0.0 < self.ratio <= 1.0:
                raise BudgetError(
                    f"budget ratio={self.ratio}: the share kept must be in (0, 1]. For a count use an integer."
                )
        if self.per not in PER:
            raise BudgetError(f"budget per={self.per!r} is unknown. Use one of: {', '.join(PER)}.")

    @classmethod
    def of(cls, value: "int | float | str | Budget", per: str = "image") -> "Budget":
        """A budget from `64` (tokens), `0.25` (share kept), `"64"`, `"0.25"`, `"25%"` or a Budget.

        Example:
            >>> Budget.of("25%")
            Budget(tokens=None, ratio=0.25, per='image')
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            text = value.strip()
            try:
                if text.endswith("%"):
                    return cls(ratio=float(text[:-1]) / 100.0, per=per)
                return (
                    cls(tokens=int(text), per=per) if text.lstrip("+-").isdigit() else cls(ratio=float(text), per=per)
                )
            except ValueError as error:
                if isinstance(error, BudgetError):
                    raise
                raise BudgetError(f"budget {value!r} is not a number. Use 64, 0.25 or '25%'.") from None
        if isinstance(value, float):
            return cls(ratio=value, per=per)
        return cls(tokens=value, per=per)

    def resolve(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens that stay in each group of `lengths` tokens; never more than the group has."""
        if self.tokens is not None:
            return tuple(min(self.tokens, n) for n in lengths)
        assert self.ratio is not None
        return tuple(min(n, max(1, round(self.ratio * n))) for n in lengths)

    def __str__(self) -> str:
        return str(self.tokens) if self.tokens is not None else str(self.ratio)
