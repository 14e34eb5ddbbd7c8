"""`python -m tests.support.touch PATH TEXT`: a program that writes its second argument to a file.

With `--folder` before the text it writes a folder like a training run's; with
`--refuse` it ends as a program with invalid options.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    path, *mode, text = sys.argv[1:]
    if mode == ["--refuse"]:
        sys.exit(2)
    if mode == ["--folder"]:
        Path(path).mkdir(exist_ok=True)
        path = f"{path}/config.yaml"
    Path(path).write_text(text)
