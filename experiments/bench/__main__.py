"""python -m experiments.bench"""

import sys

from experiments.bench.bench import main

sys.exit(main())
