"""Module: a thin holder of parameters, gradients and what the last forward left for backward.

The mathematics of a layer is a pair of pure functions beside it, `layer_forward(...) -> y, cache` and
`layer_backward(dy, cache) -> dx, ...`. The module owns the parameters, keeps the cache of its last forward, and adds
the parameters' gradients up. Parameters and gradients of a whole network are views of two flat buffers, so
an optimiser, an average or an all-reduce over them is a few vector operations.
"""

import numpy as np

from nn.backend import array_module, device_module, to_device


class Parameter:
    """One trained array and its gradient; both become views of the owning network's flat buffers."""

    def __init__(self, value):
        self.value = value
        self.grad = array_module(value).zeros_like(value)


class Module:
    """Base of layers and networks: `forward`, `backward`, and the walk over everything below it.

    Attributes that are Parameters, Modules or lists of Modules are found by that walk, in order of
    assignment; their attribute names, joined by dots, are the parameters' names.
    """

    training = True
    _cache = None
    _flat = None

    def forward(self, x):
        raise NotImplementedError

    def backward(self, dy, *, params=True):
        """Vector-Jacobian product of the last forward: returns dx; with `params` also adds to the gradients."""
        raise NotImplementedError

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def _remember(self, y, cache):
        """Keep what backward will need for this output, and return the output."""
        self._cache, self._output_shape = cache, y.shape
        return y

    def _recall(self, dy):
        """The last forward's cache, after checking that there was one and that dy has its output's shape."""
        if self._cache is None:
            raise RuntimeError(f"{type(self).__name__}.backward: call forward first")
        if dy.shape != self._output_shape:
            raise ValueError(f"{type(self).__name__}.backward: dy has shape {dy.shape}, "
                             f"but the last forward returned {self._output_shape}")
        return self._cache

    # ---- the tree

    def children(self):
        """(name, module) pairs directly below."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    if isinstance(item, Module):
                        yield f"{name}.{i}", item

    def modules(self):
        """This module and all below it."""
        yield self
        for _, child in self.children():
            yield from child.modules()

    def named_parameters(self, prefix=""):
        """(name, Parameter) pairs, own first, then the children's, in order of assignment."""
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                yield prefix + name, value
        for name, child in self.children():
            yield from child.named_parameters(f"{prefix}{name}.")

    def parameters(self):
        """Dict name -> array, views of `flat_parameters`."""
        return {name: p.value for name, p in self.named_parameters()}

    def gradients(self):
        """Dict name -> array with the names and shapes of `parameters`, views of `flat_gradients`."""
        return {name: p.grad for name, p in self.named_parameters()}

    @property
    def num_parameters(self):
        return sum(p.value.size for _, p in self.named_parameters())

    # ---- one flat buffer

    @property
    def flat_parameters(self):
        """All parameters as one contiguous vector; writing to it changes the network."""
        return self._flatten()[0]

    @property
    def flat_gradients(self):
        """All gradients as one contiguous vector, in the order of `flat_parameters`."""
        return self._flatten()[1]

    def _flatten(self):
        parameters = [p for _, p in self.named_parameters()]
        if self._flat is None or not _same_objects([p.value for p in parameters], self._views):
            if not parameters:
                raise ValueError(f"{type(self).__name__} has no parameters")
            xp, dtype = array_module(parameters[0].value), parameters[0].value.dtype
            self.use_buffers(xp.empty(self.num_parameters, dtype), xp.zeros(self.num_parameters, dtype))
        return self._flat

    def use_buffers(self, flat_parameters, flat_gradients):
        """Move parameters and gradients into the two given vectors (shared memory, say), keeping their values."""
        for flat in (flat_parameters, flat_gradients):
            if flat.shape != (self.num_parameters,):
                raise ValueError(f"use_buffers: need vectors of {self.num_parameters} entries, got shape {flat.shape}")
        self._bind(flat_parameters, flat_gradients)

    def _bind(self, flat_parameters, flat_gradients):
        """Own parameters first, then each child's in a stretch of its own, so that a part's buffers are slices."""
        start = 0
        for p in vars(self).values():
            if isinstance(p, Parameter):
                span, shape = slice(start, start + p.value.size), p.value.shape
                flat_parameters[span] = p.value.reshape(-1)
                flat_gradients[span] = p.grad.reshape(-1)
                p.value, p.grad = flat_parameters[span].reshape(shape), flat_gradients[span].reshape(shape)
                start = span.stop
        for _, child in self.children():
            span = slice(start, start + child.num_parameters)
            child._bind(flat_parameters[span], flat_gradients[span])
            start = span.stop
        self._flat = flat_parameters, flat_gradients
        # Whose views these are is checked at each use: becoming part of a larger network may have moved them.
        self._views = [p.value for _, p in self.named_parameters()]

    def __getstate__(self):
        """What a copy or a pickle takes along: parameters, but not the buffers, of which the copy makes its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_flat", "_views", "_cache")}

    def zero_grad(self):
        """Set all gradients to zero."""
        if self.num_parameters:
            self.flat_gradients[...] = 0

    # ---- modes and places

    def train(self):
        """Training mode: dropout is on."""
        return self._set_training(True)

    def eval(self):
        """Evaluation mode: dropout is off."""
        return self._set_training(False)

    def _set_training(self, training):
        for module in self.modules():
            module.training = training
        return self

    def to(self, device):
        """Move parameters and gradients to "cpu" or "cuda"; errors as `nn.backend.to_device`."""
        device_module(device)
        for _, p in self.named_parameters():
            p.value, p.grad = to_device(p.value, device), to_device(p.grad, device)
        for module in self.modules():
            module._cache = module._flat = None
        return self

    def load(self, arrays):
        """Set every parameter from a dict like `parameters()`; ValueError on missing, unknown or misshapen ones."""
        own = self.parameters()
        if own.keys() != arrays.keys():
            missing, extra = sorted(own.keys() - arrays.keys()), sorted(arrays.keys() - own.keys())
            raise ValueError(f"parameters do not fit {type(self).__name__}: missing {missing[:3]}, unknown {extra[:3]}")
        for name, value in own.items():
            if value.shape != arrays[name].shape:
                raise ValueError(f"parameter {name} has shape {arrays[name].shape}, but the network needs "
                                 f"{value.shape}")
            value[...] = array_module(value).asarray(arrays[name])


def _same_objects(a, b):
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def uniform_fan_in(rng, shape, fan_in, dtype, *, like=np):
    """Initial weights, uniform in +-1/sqrt(fan_in): outputs of roughly the inputs' size, whatever the width."""
    bound = 1 / np.sqrt(fan_in)
    return like.asarray(rng.uniform(-bound, bound, shape).astype(dtype))


def zeros(shape, dtype):
    """Initial zeros: biases, and last layers that start a block as the identity."""
    return np.zeros(shape, dtype)
