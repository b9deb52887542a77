"""Paces: how many tokens stay after each of several repetitions of a stage (see `Repeat.pace`)."""


def even_pace(total: int, budget: int, step: int, steps: int) -> int:
    """Equal steps from `total` to `budget`; they differ by at most one token.

    Example:
        >>> [even_pace(16, 6, step, 4) for step in range(4)]
        [14, 11, 9, 6]
    """
    return total - (total - budget) * (step + 1) // steps


def linear_counts(count: int, inflection: float, steps: int) -> list[int]:
    """Tokens merged at each of `steps` blocks: `count` in the middle, falling (or rising) linearly from the first on.

    The first is count * (1 - inflection), the last 2 * count less that, each cut to an integer.

    Example:
        >>> linear_counts(10, -0.5, 3)
        [15, 10, 5]
    """
    first = int(count * (1.0 - inflection))
    last = 2 * count - first
    return [int(first + (last - first) * i / max(1, steps - 1)) for i in range(steps)]


def linear_pace(total: int, budget: int, step: int, steps: int, *, inflection: float) -> int:
    """As `even_pace`, with steps in the proportions of `linear_counts`.

    Example:
        >>> [linear_pace(65, 35, step, 3, inflection=-0.5) for step in range(3)]
        [50, 40, 35]
    """
    share = [1.0 - inflection + 2.0 * inflection * i / max(1, steps - 1) for i in range(steps)]
    if steps == 1 or sum(share) <= 0:
        return even_pace(total, budget, step, steps)
    done = sum(share[: step + 1]) / sum(share)
    return budget if step + 1 == steps else total - int((total - budget) * done + 1e-9)


def geometric_pace(total: int, budget: int, step: int, steps: int) -> int:
    """As `even_pace`, with the same share of what is left in each step, cut to an integer.

    Example:
        >>> [geometric_pace(576, 72, step, 3) for step in range(3)]
        [288, 144, 72]
    """
    if step + 1 == steps:
        return budget
    return max(budget, int(total * (budget / total) ** ((step + 1) / steps) + 1e-9))
