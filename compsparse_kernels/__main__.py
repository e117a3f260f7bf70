"""``python -m compsparse_kernels``: see :mod:`compsparse_kernels.cli`."""

import sys

from compsparse_kernels.cli import main

sys.exit(main())
