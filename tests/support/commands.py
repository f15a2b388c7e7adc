"""Run by tests in a process of its own, often as another user: commands one after another.

argv: a JSON file with the commands, and the size in bytes that a file may grow to, or null. Prints
a JSON list with the exit code and the last lines of stdout and stderr of each.
"""

import io
import json
import os
import resource
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path


def run(line):
    from hf_kernel_ffn.cli.app import main

    sys.argv = ["hf-kernel-ffn", *line]
    out = io.StringIO()
    error = io.StringIO()
    code = 0
    try:
        with redirect_stdout(out), redirect_stderr(error):
            main()
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        code = 1
        error.write(traceback.format_exc())
    return code, out.getvalue(), error.getvalue()


if __name__ == "__main__":
    work = json.loads(Path(sys.argv[1]).read_text())
    if work["largest_file"] is not None:
        limit = work["largest_file"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    print(json.dumps([run(line) for line in work["commands"]]), flush=True)
    os._exit(0)  # an import of torch that failed halfway, for want of room, may crash at the end
