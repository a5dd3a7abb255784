"""python -m polyvisor.cli"""

import sys

from polyvisor.cli import main

sys.exit(main())
