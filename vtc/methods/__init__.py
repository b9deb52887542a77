"""Every method, one file each. Importing this package registers them."""

from vtc.methods.dart import DART
from vtc.methods.divprune import DivPrune
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.pool import Pool
from vtc.methods.random import Random
from vtc.methods.uniform import Uniform
from vtc.methods.visionzip import VisionZip

__all__ = ["DART", "DivPrune", "FastV", "FasterVLM", "Pool", "Random", "Uniform", "VisionZip"]
