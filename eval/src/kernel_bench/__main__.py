"""Runs `vtc.eval.kernel_bench.measure`."""

import sys

from vtc.eval.kernel_bench.measure import main

sys.exit(main())
