"""A strict stand-in for a GPU: arrays on a pretended device, which refuse everything that would be wrong or slow there.

`xp` is the array library (as `cupy` would be), `FakeArray` its array type. Behind both is NumPy, so results are the
same to the last bit, but the manners are a device's, and stricter than CuPy's own:

- A FakeArray and an `np.ndarray` never mix: not in operators, functions, `out=`, indices or assignments (TypeError).
  Python and NumPy scalars go with either.
- `np.*` functions don't take a FakeArray, and nothing converts one to the host by the way (`np.asarray`).
- Values that Python asks for (`float(x)`, `if x`, `x.item()`, `x[mask]`) make the host wait for the device. They are
  refused too, except inside `with synchronisation_allowed():`.
- `xp.asarray(host)` and `xp.asnumpy(x)` are the transfers; each is recorded in `xp.transfers`, a list to be cleared
  and looked at by tests ("no transfer during a step").
- What NumPy has and CuPy lacks is absent here (`NOT_IN_CUPY`).

Importing this file registers the type with `nn.backend`, so that the whole project works on it.
"""

import contextlib
import operator
from typing import NamedTuple

import numpy as np
import scipy.special

from nn.backend import register_array_type

NOT_IN_CUPY = frozenset("""
    True_ False_ errstate seterr geterr nditer ndenumerate nested_iters frompyfunc memmap matrix asmatrix record
    recarray ma emath ctypeslib char strings rec block bmat insert einsum_path geomspace nanquantile nanpercentile
    spacing histogram_bin_edges polydiv polyder polyint vecdot matvec vecmat unstack longdouble datetime64 timedelta64
    matrix_transpose permute_dims concat isdtype cumulative_sum cumulative_prod trapezoid astype pow
    acos acosh asin asinh atan atan2 atanh bitwise_invert bitwise_left_shift bitwise_right_shift
    linalg.diagonal linalg.matrix_norm linalg.multi_dot linalg.outer linalg.svdvals linalg.tensordot linalg.trace
    linalg.vecdot linalg.vector_norm linalg.eig linalg.eigvals linalg.cond linalg.matmul linalg.cross
    linalg.matrix_transpose
""".split())
"""What CuPy 14.2 lacks (found by comparing the two modules' names), and spellings that came with CuPy 14 only."""

SYNCHRONISING = frozenset("nonzero flatnonzero argwhere unique extract compress trim_zeros".split())
"""Functions whose result's shape depends on values: the host has to wait for them."""

SPECIAL = frozenset("""
    erf erfc erfcx erfinv erfcinv ndtr log_ndtr ndtri expit log_expit logit gamma gammaln loggamma digamma psi polygamma
    xlogy xlog1py log1p expm1 entr rel_entr kl_div logsumexp softmax log_softmax i0 i0e i1 i1e
    betainc gammainc gammaincc
""".split())
"""What the project may use of `cupyx.scipy.special`."""

GENERATOR_METHODS = frozenset("""
    beta binomial chisquare dirichlet exponential f gamma geometric hypergeometric integers logseries poisson power
    random standard_exponential standard_gamma standard_normal uniform
""".split())
"""What CuPy's random Generator can draw: no normal, choice, permutation, shuffle or multivariate_normal."""

_HOST_ANSWERS = frozenset("""
    dtype finfo iinfo result_type promote_types can_cast issubdtype isscalar broadcast_shapes shape ndim size
    shares_memory may_share_memory
""".split())


class Transfer(NamedTuple):
    """One copy between the sides: "to_device" or "to_host", and the shape that was moved."""

    direction: str
    shape: tuple


class Flags(NamedTuple):
    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


_synchronisation_allowed = False


@contextlib.contextmanager
def synchronisation_allowed():
    """Inside, `float(x)`, `bool(x)`, `x.item()`, `x[mask]` ... work, and are recorded in `xp.transfers`."""
    global _synchronisation_allowed
    before, _synchronisation_allowed = _synchronisation_allowed, True
    try:
        yield
    finally:
        _synchronisation_allowed = before


def _synchronise(what, shape=()):
    if not _synchronisation_allowed:
        raise TypeError(f"{what} makes the host wait for the device; keep the value on the device, "
                        "or allow it with synchronisation_allowed()")
    xp.transfers.append(Transfer("to_host", shape))


class FakeArray:
    """An array on the pretended device; made by `xp.asarray`, `xp.zeros`, ... only."""

    __array_ufunc__ = None      # NumPy arrays and scalars hand operators over to the reflected methods below
    __hash__ = None
    __slots__ = ("_data",)

    def __init__(self, *args, **kwargs):
        raise TypeError("make device arrays with xp.asarray, xp.zeros, ...")

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion of a device array to NumPy; use nn.backend.to_host")

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"numpy.{function.__name__} was called with a device array; use array_module(x)'s")

    def __repr__(self):
        return f"FakeArray(shape={self.shape}, dtype={self.dtype})"

    def __deepcopy__(self, memo):
        return self.copy()

    # ---- what the host knows without asking the device

    shape = property(lambda self: self._data.shape)
    strides = property(lambda self: self._data.strides)
    dtype = property(lambda self: self._data.dtype)
    ndim = property(lambda self: self._data.ndim)
    size = property(lambda self: self._data.size)
    itemsize = property(lambda self: self._data.itemsize)
    nbytes = property(lambda self: self._data.nbytes)
    T = property(lambda self: _wrap(self._data.T))
    real = property(lambda self: _wrap(self._data.real))
    imag = property(lambda self: _wrap(self._data.imag))

    @property
    def flags(self):
        flags = self._data.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, flags.owndata)

    def __len__(self):
        return len(self._data)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    # ---- indexing: basic indices give views; device arrays may index, host arrays may not

    def __getitem__(self, index):
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, FakeArray) and part.dtype == bool:
                _synchronise("indexing with a boolean mask", part.shape)
        return _wrap(self._data[_index(index)])

    def __setitem__(self, index, value):
        self._data[_index(index)] = _unwrap(value, {})

    # ---- values that Python wants to see

    def __bool__(self):
        _synchronise("bool(x)")
        return bool(self._data)

    def __float__(self):
        _synchronise("float(x)")
        return float(self._data)

    def __int__(self):
        _synchronise("int(x)")
        return int(self._data)

    def __index__(self):
        _synchronise("using x as an index")
        return operator.index(self._data)

    def __complex__(self):
        _synchronise("complex(x)")
        return complex(self._data)

    def item(self, *args):
        _synchronise("x.item()")
        return self._data.item(*args)

    def tolist(self):
        _synchronise("x.tolist()", self.shape)
        return self._data.tolist()

    def get(self):
        """An explicit transfer to the host, as CuPy's `x.get()`."""
        return xp.asnumpy(self)


def _binary(name):
    function = getattr(operator, name)

    def forward(self, other):
        return function_or_not_implemented(self, other, lambda a, b: function(a, b))

    def reflected(self, other):
        return function_or_not_implemented(self, other, lambda a, b: function(b, a))

    def function_or_not_implemented(self, other, apply):
        if not isinstance(other, (FakeArray, np.ndarray, list, tuple)) and not _is_scalar(other):
            return NotImplemented
        _refuse_host(other)
        return _wrap(apply(self._data, other._data if isinstance(other, FakeArray) else other))

    return forward, reflected


def _in_place(name):
    function = getattr(operator, "i" + name.strip("_"))

    def method(self, other):
        _refuse_host(other)
        function(self._data, other._data if isinstance(other, FakeArray) else other)
        return self

    return method


def _unary(name):
    function = getattr(operator, name)
    return lambda self: _wrap(function(self._data))


def _method(name):
    def method(self, *args, **kwargs):
        if name in SYNCHRONISING:
            _synchronise(f"x.{name}()", self.shape)
        return _call(getattr(self._data, name), args, kwargs, {id(self._data): self})

    method.__name__ = name
    return method


for _name in "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift".split():
    _plain = _name.strip("_")
    _forward, _reflected = _binary(_name)
    setattr(FakeArray, f"__{_plain}__", _forward)
    setattr(FakeArray, f"__r{_plain}__", _reflected)
    setattr(FakeArray, f"__i{_plain}__", _in_place(_name))
for _name in "eq ne lt le gt ge".split():
    setattr(FakeArray, f"__{_name}__", _binary(_name)[0])
for _name in "neg pos abs invert".split():
    setattr(FakeArray, f"__{_name}__", _unary(_name))
for _name in """all any argmax argmin argsort astype clip compress conj copy cumprod cumsum diagonal dot fill flatten
                max mean min nonzero partition prod put ravel repeat reshape round sort squeeze std sum swapaxes take
                trace transpose var view""".split():
    setattr(FakeArray, _name, _method(_name))


class FakeModule:
    """NumPy's functions (or SciPy's) for FakeArrays only; `xp`, `xp.linalg`, `xp.special`, ... are of this type."""

    def __init__(self, host_module, name, offers=None, parent=""):
        self._host_module, self._offers, self._parent = host_module, offers, parent
        self.__name__ = name

    def __repr__(self):
        return f"<fake device module {self.__name__}>"

    def __getattr__(self, name):
        known = name in self._offers if self._offers is not None else self._parent + name not in NOT_IN_CUPY
        if name.startswith("__") or not known or not hasattr(self._host_module, name):
            raise AttributeError(f"{self.__name__}.{name} does not exist on the device")
        host = getattr(self._host_module, name)
        if isinstance(host, type) or not callable(host):
            return host
        if name in _HOST_ANSWERS:
            return lambda *args, **kwargs: host(*_unwrap(args, {}), **kwargs)
        if isinstance(host, np.ufunc):
            return FakeUfunc(host)

        def function(*args, **kwargs):
            if name in SYNCHRONISING or name == "where" and len(args) == 1:
                _synchronise(f"xp.{name}", getattr(args[0], "shape", ()))
            return _call(host, args, kwargs, {})

        function.__name__ = name
        return function


class FakeUfunc:
    """An elementwise function of the device; `out=` and `dtype=` as in CuPy, no `where=`."""

    def __init__(self, host):
        self._host, self.__name__ = host, host.__name__

    def __call__(self, *args, **kwargs):
        return _call(self._host, args, kwargs, {})

    def at(self, *args):
        return _call(self._host.at, args, {}, {})

    def outer(self, *args):
        return _call(self._host.outer, args, {}, {})


class FakeGenerator:
    """A random generator that draws on the device."""

    def __init__(self, seed=None):
        self._generator = np.random.default_rng(seed)

    def __getattr__(self, name):
        if name not in GENERATOR_METHODS:
            raise AttributeError(f"the device's Generator has no {name}")
        return lambda *args, **kwargs: _call(getattr(self._generator, name), args, kwargs, {})


class _Random:
    Generator = FakeGenerator

    @staticmethod
    def default_rng(seed=None):
        return FakeGenerator(seed)


class FakeDevice(FakeModule):
    """The array library `xp` itself: the functions of `FakeModule`, submodules and the two transfers."""

    ndarray = FakeArray
    random = _Random()

    def __init__(self):
        super().__init__(np, "fake")
        self.transfers = []
        self.linalg = FakeModule(np.linalg, "fake.linalg", parent="linalg.")
        self.fft = FakeModule(np.fft, "fake.fft")
        self.special = FakeModule(scipy.special, "fake.special", offers=SPECIAL)
        self.lib = FakeModule(None, "fake.lib", offers=())
        self.lib.stride_tricks = FakeModule(np.lib.stride_tricks, "fake.lib.stride_tricks",
                                            offers=("as_strided", "sliding_window_view"))

    def asarray(self, x, dtype=None):
        """`x` on the device: a FakeArray stays (a view, unless the dtype changes), host values are transferred."""
        if isinstance(x, FakeArray):
            return x if dtype is None or x.dtype == dtype else x.astype(dtype)
        return self.array(x, dtype)

    def array(self, x, dtype=None, copy=True):
        """A new device array from host values (a transfer), from a device array, or from a list of device arrays."""
        if isinstance(x, FakeArray):
            return x.astype(dtype or x.dtype, copy=copy)
        if isinstance(x, (list, tuple)) and any(isinstance(part, FakeArray) for part in x):
            return self.stack(x).astype(dtype or x[0].dtype)
        host = np.array(x, dtype=dtype)
        if host.ndim:
            self.transfers.append(Transfer("to_device", host.shape))
        return _wrap(host)

    def asnumpy(self, x):
        """A host copy of `x`: the explicit transfer (a NumPy array is returned as it is)."""
        if not isinstance(x, FakeArray):
            return np.asarray(x)
        self.transfers.append(Transfer("to_host", x.shape))
        return x._data.copy()

    def ascontiguousarray(self, x, dtype=None):
        _refuse_host(x)
        return _call(np.ascontiguousarray, (x, dtype), {}, {})


def _is_scalar(x):
    return isinstance(x, (bool, int, float, complex, np.generic))


def _refuse_host(x):
    if isinstance(x, np.ndarray):
        raise TypeError("a NumPy array meets a device array; move one of them with to_host or to_device")
    if isinstance(x, (list, tuple)):
        raise TypeError("a list meets a device array; move it with xp.asarray")


def _wrap(result):
    """Device arrays for all arrays of a NumPy result; NumPy scalars become 0-d arrays, as on a GPU."""
    if isinstance(result, (np.ndarray, np.generic)):
        array = object.__new__(FakeArray)
        array._data = np.asarray(result)
        return array
    if type(result) in (list, tuple):
        return type(result)(_wrap(part) for part in result)
    if isinstance(result, tuple):                       # named tuples: slogdet, eigh, svd
        return type(result)(*(_wrap(part) for part in result))
    return _wrap(np.bool_(result)) if isinstance(result, bool) else result


def _unwrap(x, seen):
    """NumPy's view of an argument; `seen` remembers which device array each came from, to hand the same one back."""
    if isinstance(x, FakeArray):
        seen[id(x._data)] = x
        return x._data
    if isinstance(x, np.ndarray):
        _refuse_host(x)
    if type(x) in (list, tuple):
        return type(x)(_unwrap(part, seen) for part in x)
    return x


def _index(index):
    """NumPy's index from ours; an ellipsis is added, so that a full index gives a 0-d view as on a GPU."""
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        _refuse_host(part)
    parts = tuple(part._data if isinstance(part, FakeArray) else part for part in parts)
    return parts if any(part is Ellipsis for part in parts) else (*parts, ...)


def _call(function, args, kwargs, seen):
    if kwargs.get("where", True) is not True:
        raise TypeError("where= is not offered by the device's functions")
    args, kwargs = _unwrap(args, seen), {name: _unwrap(value, seen) for name, value in kwargs.items()}
    result = function(*args, **kwargs)
    return seen[id(result)] if id(result) in seen else _wrap(result)


xp = FakeDevice()
register_array_type(FakeArray, xp)
