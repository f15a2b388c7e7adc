#!/usr/bin/env python3
"""The same as `hf-kernel-ffn convert`."""

import sys

from hf_kernel_ffn.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
