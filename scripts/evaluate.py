#!/usr/bin/env python3
"""The same as `hf-kernel-ffn evaluate`."""

import sys

del sys.path[0]  # this folder, whose evaluate.py would hide the evaluate package

from hf_kernel_ffn.cli.app import main  # noqa: E402

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
