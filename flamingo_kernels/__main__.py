"""``python -m flamingo_kernels`` is the command ``flamingo-kernels``."""

import sys

from flamingo_kernels.cli import main

sys.exit(main())
