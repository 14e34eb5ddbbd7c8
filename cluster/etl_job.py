"""Entry point for `spark-submit`: the sessions job, with the packages from `--py-files` (`make package`).

It is outside the package, since `spark-submit etl/__main__.py` would put `etl/` itself first on the module path.
"""

import sys

from etl.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
