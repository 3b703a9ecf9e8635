"""python -m experiments.bench"""

import os
import sys

# Torch's profiler would announce its starts and stops, and tensors older than it. Torch reads this when it is imported.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

from experiments.bench.bench import main

sys.exit(main())
