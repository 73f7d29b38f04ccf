"""Is backward the transpose of forward's derivative?

For a direction v in the inputs and parameters and a direction w in the outputs, <w, J v> = <J^T w, v>. The left
side comes from a central difference of forward, the right side from one backward: two numbers to compare, whatever
the network's size. In float64, with steps of 1e-6, they agree to about 1e-9 where the code is right.

A network whose last layer starts at zero passes whatever stands before that layer: give it random parameters first.
"""

import numpy as np


def gradcheck(module, *inputs, directions=3, step=1e-6, rng=None, check_input=True):
    """Largest relative error between <w, J v> by central differences and <J^T w, v> by backward.

    Parameters
    ----------
    module : Module
        In float64 (ValueError otherwise); stochastic layers must hold their masks fixed.
    *inputs : arrays
        Arguments of forward; the first is perturbed too (`check_input`), the others are held.
    directions : int
        Independent random pairs (v, w).
    rng : numpy.random.Generator, optional

    Returns
    -------
    float, at most about 1e-6 for a correct backward.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    x, rest = inputs[0], inputs[1:]
    trained = any(True for _ in module.named_parameters())
    if x.dtype != np.float64 or (trained and module.flat_parameters.dtype != np.float64):
        raise ValueError("gradcheck: differences need float64; make the module and x with dtype float64")
    worst = 0.0
    for _ in range(directions):
        vx = rng.standard_normal(x.shape) if check_input else np.zeros(x.shape)
        y = module(x, *rest)
        w = rng.standard_normal(y.shape)
        if trained:
            module.zero_grad()
        dx = module.backward(w)
        vjp = (dx * vx).sum() if check_input else 0.0
        if trained:
            theta = module.flat_parameters
            vp = rng.standard_normal(theta.shape)
            vjp += (module.flat_gradients * vp).sum()
            start = theta.copy()
        ends = []
        for sign in (1, -1):
            if trained:
                theta[...] = start + sign * step * vp
            ends.append((w * module(x + sign * step * vx, *rest)).sum())
        if trained:
            theta[...] = start
        jvp = (ends[0] - ends[1]) / (2 * step)
        worst = max(worst, abs(jvp - vjp) / max(abs(jvp), abs(vjp), 1e-300))
    return float(worst)
