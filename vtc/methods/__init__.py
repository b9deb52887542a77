"""Every method, one file each. Importing this package registers them.

Called, the package lists them: `vtc.methods()`.
"""

import sys
from types import ModuleType

from vtc.catalogue import registry
from vtc.methods.aim import AIM
from vtc.methods.cdpruner import CDPruner
from vtc.methods.dart import DART
from vtc.methods.divprune import DivPrune
from vtc.methods.downsample import Downsample
from vtc.methods.dymu import DyMU
from vtc.methods.efficientvla import EfficientVLA
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.ficoco_l import FiCoCoL
from vtc.methods.ficoco_v import FiCoCoV
from vtc.methods.ficoco_vl import FiCoCoVL
from vtc.methods.flashvla import FlashVLA
from vtc.methods.fopru import FoPru
from vtc.methods.g_prune import GPrune
from vtc.methods.globalcom2 import GlobalCom2
from vtc.methods.greedyprune import GreedyPrune
from vtc.methods.hired import HiRED
from vtc.methods.learning_free import LearningFree
from vtc.methods.lvlm_csp import LVLMCSP
from vtc.methods.mustdrop import MustDrop
from vtc.methods.mustdrop_llm import MustDropLLM
from vtc.methods.pact import PACT
from vtc.methods.pool import Pool
from vtc.methods.promptdistill import PromptDistill
from vtc.methods.prumerge import PruMerge, PruMergePlus
from vtc.methods.pyramiddrop import PyramidDrop
from vtc.methods.random import Random
from vtc.methods.shortv import ShortV
from vtc.methods.sparsevlm import SparseVLM, SparseVLMPlus
from vtc.methods.sparsity_meets_similarity import SparsityMeetsSimilarity
from vtc.methods.star import STAR
from vtc.methods.todre import ToDRE
from vtc.methods.token_transforming import TokenTransforming
from vtc.methods.tokencorr import TokenCorr
from vtc.methods.tome import ToMe
from vtc.methods.topv import TopV
from vtc.methods.uniform import Uniform
from vtc.methods.visionzip import VisionZip
from vtc.methods.vispruner import VisPruner
from vtc.methods.vtc_cls import VTCCLS

__all__ = [
    "AIM",
    "DART",
    "LVLMCSP",
    "PACT",
    "STAR",
    "VTCCLS",
    "CDPruner",
    "DivPrune",
    "Downsample",
    "DyMU",
    "EfficientVLA",
    "FastV",
    "FasterVLM",
    "FiCoCoL",
    "FiCoCoV",
    "FiCoCoVL",
    "FlashVLA",
    "FoPru",
    "GPrune",
    "GlobalCom2",
    "GreedyPrune",
    "HiRED",
    "LearningFree",
    "MustDrop",
    "MustDropLLM",
    "Pool",
    "PromptDistill",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "Random",
    "ShortV",
    "SparseVLM",
    "SparseVLMPlus",
    "SparsityMeetsSimilarity",
    "ToDRE",
    "ToMe",
    "TokenCorr",
    "TokenTransforming",
    "TopV",
    "Uniform",
    "VisPruner",
    "VisionZip",
]


class _Methods(ModuleType):
    # the import system sets this package as the attribute `vtc.methods`, where users find the list of slugs
    def __call__(self) -> tuple[str, ...]:
        return registry.methods()


sys.modules[__name__].__class__ = _Methods
