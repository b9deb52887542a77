"""What tests need, public so that users can check their own methods.

`tiny` builds random-weight models of every family, `oracle` the masked full model that compression must equal,
`golden` loads recorded outputs of the authors' own code.
"""

from vtc.testing.conformance import check_method
from vtc.testing.oracle import GivenStages, masked_logits, relative_difference, visible_columns
from vtc.testing.self_check import SelfCheck, self_check
from vtc.testing.tiny import TinyModel, families, tiny

__all__ = [
    "GivenStages",
    "SelfCheck",
    "TinyModel",
    "check_method",
    "families",
    "masked_logits",
    "relative_difference",
    "self_check",
    "tiny",
    "visible_columns",
]
