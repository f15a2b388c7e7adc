"""Plain float64 loops for what the package computes: kernels, simplex maps, a whole kernel-readout
layer, readability."""

import math

import numpy as np

KERNELS = {
    "exponential": lambda x, w, b: math.exp(x @ w) * math.exp(b),
    "gaussian": lambda x, w, b, bandwidth: math.exp(-sum((x - w) ** 2) / (2 * bandwidth)),
    "imq": lambda x, w, b, offset: (sum((x - w) ** 2) + offset) ** -0.5,
    "yat": lambda x, w, b, epsilon: (x @ w + b) ** 2 / (sum((x - w) ** 2) + epsilon),
    "exponential-yat": lambda x, w, b, epsilon, rate: (
        math.exp(rate * (x @ w + b)) * (x @ w + b) ** 2 / (sum((x - w) ** 2) + epsilon)
    ),
    "half-yat": lambda x, w, b, epsilon: max(x @ w + b, 0.0) ** 2 / (sum((x - w) ** 2) + epsilon),
}


def _root(decreasing, low, high):
    """Zero of a decreasing function by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(middle) > 0 else (low, middle)
    return (low + high) / 2


def shares(name, kernel, temperature=1.0, top_k=None):
    """Shares of nonnegative kernel values (a sequence of floats)."""
    return shares_of_logs(
        name, [math.log(k) if k > 0 else -math.inf for k in kernel], temperature, top_k
    )


def shares_of_logs(name, log_kernel, temperature=1.0, top_k=None):
    pi = np.zeros(len(log_kernel))
    firing = [i for i, value in enumerate(log_kernel) if value > -math.inf]
    if name == "top-k":
        firing = sorted(firing, key=lambda i: -log_kernel[i])[:top_k]
    if not firing:
        return pi
    best = max(log_kernel[i] for i in firing)
    s = {i: (log_kernel[i] - best) / temperature for i in firing}
    if name in ("softmax", "top-k", "threshold"):
        raw = {i: math.exp(v) for i, v in s.items()}
    elif name == "sparsemax":
        threshold = _root(lambda t: sum(max(v - t, 0) for v in s.values()) - 1, -1.0, 0.0)
        raw = {i: max(v - threshold, 0) for i, v in s.items()}
    elif name == "entmax-1.5":
        threshold = _root(lambda t: sum(max(v / 2 - t, 0) ** 2 for v in s.values()) - 1, -1.0, 0.0)
        raw = {i: max(v / 2 - threshold, 0) ** 2 for i, v in s.items()}
    else:
        raise ValueError(name)
    for i, value in raw.items():
        pi[i] = value / sum(raw.values())
    return pi


def _weights(linear):
    weight = linear.weight.detach().double().numpy()
    bias = np.zeros(len(weight)) if linear.bias is None else linear.bias.detach().double().numpy()
    return weight, bias


def layer(ffn, x):
    """Coefficients and output of a KernelFFN at one input ``x`` (a float64 vector), by the
    formula."""
    settings = ffn.config.settings
    learned = {
        name: ffn.config.reference[name] * math.exp(ratio.item())
        for name, ratio in ffn.log_ratio.items()
    }
    rows, b = _weights(ffn.input_prototypes)
    parameters = {name: learned[name] for name in ffn.kernel.parameters}
    kappa = [KERNELS[settings.kernel](x, w, b_i, **parameters) for w, b_i in zip(rows, b)]
    if settings.simplex in (
        "top-k",
        "threshold",
    ):  # those that are loudest, whatever the sign of a gated value
        loudness = np.array(kappa)
        if settings.values == "gated":
            weight, bias = _weights(ffn.value_proj)
            loudness = loudness * abs(weight @ x + bias)
        least = sorted(loudness)[-settings.top_k]
        if settings.simplex == "threshold":
            least = ffn.config.reference["threshold"] * math.exp(ffn.threshold_log_ratio.item())
        kappa = [k if size >= least else 0.0 for k, size in zip(kappa, loudness)]
    pi = shares(settings.simplex, kappa, learned.get("temperature", 1.0), settings.top_k)
    g = 1.0
    if settings.intensity == "mass":
        g = learned["scale"] * sum(k for k, p in zip(kappa, pi) if p > 0)
    elif settings.intensity == "gate":
        weight, bias = _weights(ffn.gate)
        g = ffn.config.reference["scale"] * math.log1p(math.exp(weight[0] @ x + bias[0]))
    coefficients = g * pi
    if settings.values == "gated":
        weight, bias = _weights(ffn.value_proj)
        coefficients = coefficients * (weight @ x + bias)
    dictionary, b_out = _weights(ffn.output_prototypes)
    y = b_out.copy()
    for c, v in zip(coefficients, dictionary.T):
        y += c * v
    return coefficients, y


def readability(coefficients, dictionary, mean_write):
    """The figures of one token, unit by unit, from float64 vectors: DESIGN's "Metrics that cannot
    be gamed"."""
    total = sum(abs(c) for c in coefficients)
    mass = [abs(c) * math.sqrt(v @ v) for c, v in zip(coefficients, dictionary)]
    if total == 0:
        names = (
            "active_prototypes",
            "effective_prototypes",
            "coherence",
            "orthogonal_coherence",
            "opposed_share",
            "write_mass",
        )
        return dict.fromkeys(names, 0.0)
    contributions = [c * v - abs(c) / total * mean_write for c, v in zip(coefficients, dictionary)]
    written = sum(contributions)
    direction = written / math.sqrt(written @ written)
    along = [t @ direction for t in contributions]
    effective = 1 / sum((m / sum(mass)) ** 2 for m in mass)
    return {
        "active_prototypes": sum(c != 0 for c in coefficients),
        "effective_prototypes": effective,
        "coherence": math.sqrt(written @ written) / sum(math.sqrt(t @ t) for t in contributions),
        "orthogonal_coherence": 1 / math.sqrt(effective),
        "opposed_share": sum(-a for a in along if a < 0) / sum(abs(a) for a in along),
        "write_mass": sum(mass),
    }
