"""An S3 server on loopback, in a subprocess."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pa_fs

SERVE = (
    "import logging, time; logging.getLogger('werkzeug').disabled = True\n"
    "from moto.server import ThreadedMotoServer\n"
    "server = ThreadedMotoServer('127.0.0.1', 0, verbose=False); server.start()\n"
    "print(server.get_host_and_port()[1], flush=True); time.sleep(3600)"
)
BUCKET = "sessions"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start the server with one bucket; yields the environment variables for programs to reach it."""
    process = subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = f"http://127.0.0.1:{process.stdout.readline().split()[-1]}"
        variables = {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        keys = {"access_key": "key", "secret_key": "secret", "region": "us-east-1"}
        pa_fs.S3FileSystem(endpoint_override=address, allow_bucket_creation=True, **keys).create_dir(BUCKET)
        yield variables
    finally:
        process.kill()
        process.wait()
