"""Control: keep an even subsample of the grid."""

from dataclasses import dataclass

from vtc.catalogue.registry import register
from vtc.primitives import uniform_keep
from vtc.stages import Method, Site, Stage


@register
@dataclass(frozen=True)
class Uniform(Method):
    """Tokens spread evenly over the grid, whatever they show."""

    slug = "uniform"
    steps = ("even rows, then even places in the row", "none", "drop")
    fidelity = "control"

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(Site("llm_in"), uniform_keep),)
