"""Exponential moving average of the parameters: what samples are drawn with."""

from nn.backend import array_module, row_blocks
from nn.optim import ALL


class EMA:
    """An exponential moving average of a module's parameters: average <- average + (1 - d) (theta - average).

    The decay warms up, d = min(decay, (1+k)/(10+k)) at the k-th update, so that a short run does not keep
    its random start.
    """

    def __init__(self, module, decay=0.999, *, buffer=None):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must lie in [0, 1), got {decay}")
        self.module, self.decay, self.updates = module, decay, 0
        theta = module.flat_parameters
        self.average = array_module(theta).empty_like(theta) if buffer is None else buffer
        self.average[...] = theta

    def update(self, span=ALL):
        self.updates += 1
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average, theta = self.average[span], self.module.flat_parameters[span]
        for block in row_blocks(theta.size, theta.itemsize, array_module(theta)):
            average[block] += (1 - d) * (theta[block] - average[block])

    def swap(self):
        """Exchange the averaged and the current parameters (call again to undo)."""
        theta = self.module.flat_parameters
        theta[...], self.average[...] = self.average.copy(), theta.copy()
