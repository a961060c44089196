"""`python -m ppo_kernels.trainer.demo`."""

import sys

from ppo_kernels.trainer.demo import main

sys.exit(main())
