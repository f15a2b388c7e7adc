"""``python -m hf_kernel_ffn``: the command line, as ``hf-kernel-ffn``."""

from .cli.app import main

if __name__ == "__main__":
    main()
