"""Where the FFNs of that model are: five lines. With ``register_architecture(CAUSAL_MEAN)`` the
entry holds in your own script; your package may declare it instead, and then everybody's
``hf-kernel-ffn`` knows it:

    [project.entry-points."hf_kernel_ffn.architectures"]
    causal_mean = "your_package.architecture:CAUSAL_MEAN"
"""

from hf_kernel_ffn import Architecture

CAUSAL_MEAN = Architecture(
    "causal_mean",
    layers="blocks",
    ffn="",
    up="expand",
    act="act",
    down="contract",
    activation="act",
    split=True,
)
