"""Every method, one file each. Importing this package registers them."""

from vtc.methods.cdpruner import CDPruner
from vtc.methods.dart import DART
from vtc.methods.divprune import DivPrune
from vtc.methods.efficientvla import EfficientVLA
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.flashvla import FlashVLA
from vtc.methods.fopru import FoPru
from vtc.methods.g_prune import GPrune
from vtc.methods.greedyprune import GreedyPrune
from vtc.methods.hired import HiRED
from vtc.methods.learning_free import LearningFree
from vtc.methods.mustdrop import MustDrop
from vtc.methods.pact import PACT
from vtc.methods.pool import Pool
from vtc.methods.prumerge import PruMerge, PruMergePlus
from vtc.methods.random import Random
from vtc.methods.sparsity_meets_similarity import SparsityMeetsSimilarity
from vtc.methods.todre import ToDRE
from vtc.methods.tokencorr import TokenCorr
from vtc.methods.uniform import Uniform
from vtc.methods.visionzip import VisionZip
from vtc.methods.vispruner import VisPruner
from vtc.methods.vtc_cls import VTCCLS

__all__ = [
    "DART",
    "PACT",
    "VTCCLS",
    "CDPruner",
    "DivPrune",
    "EfficientVLA",
    "FastV",
    "FasterVLM",
    "FlashVLA",
    "FoPru",
    "GPrune",
    "GreedyPrune",
    "HiRED",
    "LearningFree",
    "MustDrop",
    "Pool",
    "PruMerge",
    "PruMergePlus",
    "Random",
    "SparsityMeetsSimilarity",
    "ToDRE",
    "TokenCorr",
    "Uniform",
    "VisPruner",
    "VisionZip",
]
