"""`python -m tests.support.touch FILE TEXT`: a program that writes its second argument."""

import sys
from pathlib import Path

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(sys.argv[2])
