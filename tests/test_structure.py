"""The project's shape: arrows point one way, derivations stay pure, files stay short, ids and names resolve."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import nn

ROOT = Path(__file__).resolve().parent.parent
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for folder in ("nn", "ddpm") for path in sorted((ROOT / folder).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}

DERIVATIONS = {f"ddpm.{name}" for name in
               """schedule posterior gaussian parameterization elbo rao_blackwell gddm iddpm ddpm mixture gaps
               tweedie heads sde flow""".split()}
UPPER_FLOORS = {f"ddpm.{name}" for name in """
    denoiser network_denoiser empirical guidance points samplers models variance training head_training train sample
    generate evaluate likelihood commands runs data config parallel plots metrics report errors""".split()}
MAX_LINES = 250
EQUATIONS = {f"{letter}{i:02d}" for letter, last in (("L", 22), ("G", 12), ("C", 20), ("U", 18), ("E", 32))
             for i in range(1, last + 1)}


def imports(tree, name=""):
    """Full names of all modules that a tree imports, anywhere in it; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:
                base = name.split(".")[:-node.level]
                package = ".".join(base + ([node.module] if node.module else []))
            found |= {package} | {f"{package}.{alias.name}" for alias in node.names}
    return found


def within(module, packages):
    """Whether a module is one of the packages or lies in one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def strangers(name, forbidden):
    return sorted(module for module in imports(TREES[name], name) if within(module, forbidden))


def test_the_checks_see_what_they_should():
    tree = ast.parse("import numpy\nfrom ddpm import samplers\ndef f():\n    import torch.nn as t\nfrom . import runs")
    found = imports(tree, "ddpm.x")
    assert {"numpy", "ddpm", "ddpm.samplers", "torch.nn", "ddpm.runs"} <= found
    assert within("torch.nn", {"torch"}) and within("ddpm.data", UPPER_FLOORS)
    assert not within("ddpm.data_x", {"ddpm.data"})
    assert {"nn.unet", "ddpm.schedule", "nn"} <= set(MODULES)


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("nn")])
def test_nn_knows_nothing_of_diffusion(name):
    assert strangers(name, {"ddpm", "lectures", "tests", "benchmarks"}) == []


@pytest.mark.parametrize("name", MODULES)
def test_nothing_differentiates_for_us(name):
    assert strangers(name, {"torch", "jax", "autograd", "tensorflow", "tinygrad", "flax", "mxnet", "aesara"}) == []
    assert strangers(name, {"lectures", "tests", "benchmarks"}) == []


@pytest.mark.parametrize("name", MODULES)
def test_cupy_is_imported_in_one_place(name):
    assert strangers(name, {"cupy", "cupyx"}) == [] or name == "nn.backend"


@pytest.mark.parametrize("name", sorted(DERIVATIONS & set(MODULES)))
def test_derivations_import_no_methods_and_no_commands(name):
    assert strangers(name, UPPER_FLOORS) == []
    assert [module for module in strangers(name, {"nn"}) if not within(module, {"nn.backend"})] == []


@pytest.mark.parametrize("name", sorted(DERIVATIONS & set(MODULES)))
def test_derivations_are_pure(name):
    """No I/O, no clock, no network, no randomness but a generator that was passed in."""
    outside = """os io pathlib urllib requests socket subprocess shutil time datetime pickle json logging tqdm pooch
        matplotlib random secrets"""
    assert strangers(name, set(outside.split())) == []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"open", "print", "input", "exec", "eval"}, f"line {node.lineno} calls {called}"
            assert ".random." not in called, f"line {node.lineno} calls {called}; take a generator instead"
            method = called.rpartition(".")[2]
            assert method not in {"save", "savez", "load", "tofile", "fromfile", "loadtxt", "savetxt"}, called


def test_all_derivations_exist():
    assert DERIVATIONS - set(MODULES) == set()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_one_idea(name):
    lines = len(MODULES[name].read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines"


@pytest.mark.parametrize("name", [name for name, tree in TREES.items() if tree.body])
def test_a_module_says_what_it_is(name):
    assert ast.get_docstring(TREES[name]), "no module docstring"


def test_what_nn_offers_is_documented():
    assert sorted(nn.__all__, key=str.lower) == sorted(set(nn.__all__), key=str.lower)
    for name in nn.__all__:
        thing = getattr(nn, name)
        assert inspect.getdoc(thing), f"nn.{name} has no docstring"
        assert thing.__doc__, f"nn.{name} inherits its docstring"


def test_forward_and_backward_stand_side_by_side():
    """Every pure X_forward has an X_backward below it in the same file, with one of its own cache or output."""
    for name, tree in TREES.items():
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        for function in functions:
            if name.startswith("nn.") and function.endswith("_forward"):
                partner = function.removesuffix("_forward") + "_backward"
                assert functions[functions.index(function) + 1] == partner, f"{name}.{function}"


def test_ids_in_test_names_and_in_the_code_exist():
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    named = {(i, path.name) for path in tests for i in re.findall(r"def test_([A-Z]\d\d+)_", path.read_text())}
    assert {(i, where) for i, where in named if i not in EQUATIONS} == set()
    assert named, "no test is named after an equation"
    cited = {(i, name) for name, path in MODULES.items() for i in re.findall(r"\b([LGCUE]\d\d)\b", path.read_text())}
    assert {(i, where) for i, where in cited if i not in EQUATIONS} == set()
