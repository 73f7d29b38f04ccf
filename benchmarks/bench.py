"""Time and memory of a training step and a sampling step, written by hand against PyTorch eager.

    python -m benchmarks.bench                                  the default network, 28x28 images, batch 64, two cores
    python -m benchmarks.bench --size 32 --micro-batch 4 8 16   other images; several micro-batches
    python -m benchmarks.bench --layers                         also each kind of layer alone, forward and backward

How it is measured
    same network    All contestants start from the same weights and batch. Outputs and gradients are compared before
                    anything is timed; if they differ by more than rounding, nothing is reported.
    same cores      PyTorch gets as many threads as the hand-written network gets processes.
    same machine    Each contestant lives in processes of its own and sleeps while another runs. They take turns,
                    A B C A B C ..., so that a slow spell of the machine meets all of them; ratios are taken within a
                    round, and the median over rounds is reported.
    quiet machine   What other processes used of the cores meanwhile is reported. Threads that wait for each other many
                    times a step suffer most when a core is taken away: above BUSY the ratios would say more
                    about the load than about the contestants and are left out. --cpu-time then compares CPU
                    seconds of one process with one thread on each side; it says nothing about how the two scale.
    PyTorch at its  channels-first (its default) and channels-last; fused Adam, foreach clipping and averaging;
    best            inference_mode for sampling.
    memory          Most bytes held at once by a contestant's processes together, pages they share counted once
                    (benchmarks/runner.py), in steps that are not timed; with and without what its imports held.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.contestants import Problem
from benchmarks.layers import kinds_of
from benchmarks.runner import ROOT, Runner, cpu_model, family_seconds, machine_seconds

TOLERANCE = 5e-5            # relative L2 of outputs and of all gradients; rounding in float32 gives about 2e-6
BUSY = 0.1                  # share of the cores that others may use before wall-clock ratios mean nothing
LAYOUTS = ("channels_first", "channels_last")


def main(arguments=None):
    args = parse(arguments)
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("the benchmark compares with PyTorch, which is not installed here: pip install torch")
    problem = Problem(args.size, args.channels, args.batch, args.base_channels, args.channel_mults, args.blocks)
    report = dict(command=command(sys.argv[1:] if arguments is None else arguments), machine=machine(),
                  problem=vars(problem), workers=args.workers)
    for step in args.steps:
        report[step] = measure_steps(step, problem, args)
    if args.layers:
        report["layers"] = measure_layers(problem, args)
    text = as_markdown(report)
    print(text)
    args.out.write_text(text)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=28, help="height and width of the images")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--base-channels", type=int, default=32)
    parser.add_argument("--channel-mults", type=lambda text: tuple(map(int, text.split(","))), default=(1, 2, 2))
    parser.add_argument("--blocks", type=int, default=1, help="residual blocks per level")
    parser.add_argument("--workers", type=int, default=2, help="our processes, and PyTorch's threads")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8], help="images that a worker takes at once")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=2, help="steps in a row within a round; their mean counts")
    parser.add_argument("--steps", nargs="+", choices=["train", "sample"], default=["train", "sample"])
    parser.add_argument("--layers", action="store_true", help="also time each kind of layer")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results.md", help="where the tables go")
    parser.add_argument("--json", type=Path, help="file for all numbers, round by round")
    parser.add_argument("--cpu-time", action="store_true",
                        help="CPU seconds instead of seconds, with one worker and one thread: for a busy machine")
    args = parser.parse_args(arguments)
    if args.cpu_time:
        args.workers = 1
    return args


def command(arguments):
    """The command line, without the places where results go."""
    places = {i + shift for i, word in enumerate(arguments) if word in ("--out", "--json") for shift in (0, 1)}
    return " ".join(["python -m benchmarks.bench"] + [word for i, word in enumerate(arguments) if i not in places])


def machine():
    """What the numbers depend on."""
    from importlib.metadata import version
    return dict(cpu=cpu_model(), cores=os.cpu_count(), system=platform.system(), python=platform.python_version(),
                numpy=version("numpy"), torch=version("torch"))


# ---- measuring

def start(kinds, problem, args):
    """Contestants of both sides, `kinds` being the names (by hand, PyTorch) of their functions."""
    by_hand, pytorch = kinds
    options = dict(problem=vars(problem))
    return ([Runner(f"by hand, micro-batch {n}", kind=by_hand, workers=args.workers, micro_batch=n, **options)
             for n in args.micro_batch]
            + [Runner(f"PyTorch {layout}", kind=pytorch, threads=args.workers, layout=layout, **options)
               for layout in LAYOUTS])


def take_turns(runners, action, args, rounds, repeat):
    """Seconds of the action per round for each runner, and the share of the cores that others used meanwhile."""
    for runner in runners:
        runner.ask(action, 2)
    def foreign():
        own = sum(os.times()[:2]) + sum(family_seconds(runner.process.pid) for runner in runners)
        used = machine_seconds()
        return None if used is None else used - own

    before = foreign()
    times, total = {runner.name: [] for runner in runners}, 0.0
    for _ in range(rounds):
        for runner in runners:
            answer = runner.ask(action, repeat)
            times[runner.name].append(sum(answer["cpu" if args.cpu_time else "seconds"]) / repeat)
            total += sum(answer["seconds"])
    return times, None if before is None else max(0.0, (foreign() - before) / (total * os.cpu_count()))


def measure_steps(step, problem, args):
    """Rows, one for each contestant, and the load by others."""
    runners = start(("ours", "pytorch"), problem, args)
    try:
        apart = compare(runners)
        times, load = take_turns(runners, step, args, args.rounds, args.repeat)
        rows = [dict(name=runner.name, seconds=times[runner.name], **apart[runner.name], imports=runner.imports,
                     peak=runner.peak_memory(step, 5), loss=runner.ask("train", 1)["result"]) for runner in runners]
        return dict(load=load, cpu_time=args.cpu_time, rows=rows)
    finally:
        for runner in runners:
            runner.close()


def compare(runners):
    """Relative L2 differences from the last runner, by runner; SystemExit when they are more than rounding."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for runner in runners:
            path = Path(folder) / "arrays.npz"
            runner.ask("check", path)
            with np.load(path) as arrays:
                found[runner.name] = {key: arrays[key].astype(np.float64) for key in arrays.files}
    reference = found[runners[-1].name]
    weights = [key for key in reference if key != "output"]

    def relative(arrays, keys):
        squares = [(np.sum((arrays[k] - reference[k])**2), np.sum(reference[k]**2)) for k in keys]
        difference, size = np.sum(squares, axis=0)
        return float(np.sqrt(difference / size))

    apart = {name: dict(output=relative(arrays, ["output"]), gradients=relative(arrays, weights),
                        worst_gradient=max(relative(arrays, [key]) for key in weights))
             for name, arrays in found.items() if arrays.keys() == reference.keys()}
    for name in found:
        if name not in apart or max(apart[name]["output"], apart[name]["gradients"]) > TOLERANCE:
            raise SystemExit(f"{name} computes something else than {runners[-1].name}, so there is nothing to time: "
                             f"{apart.get(name, 'other parameters')}")
    return apart


def measure_layers(problem, args):
    """Rows, one for each kind of layer, with milliseconds in a training step."""
    args = argparse.Namespace(**vars(args) | dict(micro_batch=args.micro_batch[:1]))
    runners, rows = start(("our_layers", "pytorch_layers"), problem, args), []
    loads = []
    try:
        for i, (kind, count) in enumerate(kinds_of(problem).items()):
            times, load = take_turns(runners, f"layer{i}", args, max(5, args.rounds // 2), 5)
            rows.append(dict(name=str(kind), count=count, seconds=[times[runner.name] for runner in runners]))
            loads.append(load)
        return dict(load=None if None in loads else float(np.mean(loads)), cpu_time=args.cpu_time, rows=rows)
    finally:
        for runner in runners:
            runner.close()


# ---- reporting

def as_markdown(report):
    m, p = report["machine"], report["problem"]
    lines = ["# Benchmarks: by hand against PyTorch", "", f"`{report['command']}`", "",
             f"{m['cpu']}, {m['cores']} cores, {m['system']}; Python {m['python']}, NumPy {m['numpy']}, "
             f"PyTorch {m['torch']} eager.", "",
             f"U-Net with {p['base_channels']} base channels, multipliers {tuple(p['channel_mults'])}, residual blocks "
             f"per level {p['blocks']}; {p['batch']} images of {p['size']}x{p['size']}x{p['channels']}, float32. "
             f"Processes by hand, with one thread each: {report['workers']}; PyTorch's threads: {report['workers']}. "
             "How it is measured: docstring of `benchmarks/bench.py`.", ""]
    titles = dict(train="Training step (forward, backward, clipping, Adam, moving average)",
                  sample="Sampling step (forward, no gradients)")
    for step, title in titles.items():
        if step in report:
            lines += [f"## {title}", "", *_step_table(report[step]), ""]
    if "layers" in report:
        lines += ["## Layers, forward and backward", "",
                  "Milliseconds in one training step, all layers of a kind together. Ratio below 1: by hand is faster.",
                  "", *_layer_table(report["layers"]), "", f"Cores used by others: {_load(report['layers'])}.", ""]
    return "\n".join(lines)


def _step_table(result):
    rows, busy = result["rows"], _is_busy(result)
    unit = "CPU ms" if result["cpu_time"] else "ms"
    lines = [f"| | {unit}, median | {unit}, best | / channels-first | / channels-last | peak MB | without imports |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        ratios = [median(a / b for a, b in zip(row["seconds"], other["seconds"], strict=True)) for other in rows[-2:]]
        memory = (["-", "-"] if row["peak"] is None or row["imports"] is None else
                  [f"{row['peak'] / 1e6:.0f}", f"{(row['peak'] - row['imports']) / 1e6:.0f}"])
        cells = [row["name"], f"{1e3 * median(row['seconds']):.0f}", f"{1e3 * min(row['seconds']):.0f}",
                 *("-" if busy else f"{ratio:.2f}" for ratio in ratios), *memory]
        lines.append("| " + " | ".join(cells) + " |")
    by_hand = rows[0]
    return lines + ["", f"{len(by_hand['seconds'])} rounds; cores used by others: {_load(result)}. "
                    f"Difference from PyTorch, relative L2: outputs {by_hand['output']:.1e}, gradients "
                    f"{by_hand['gradients']:.1e}, worst parameter {by_hand['worst_gradient']:.1e}; losses at the end: "
                    + ", ".join(f"{row['loss']:.6f}" for row in rows) + "."]


def _is_busy(result):
    return result["load"] is not None and result["load"] > BUSY and not result["cpu_time"]


def _load(result):
    """What others used of the cores, in words."""
    share = "unknown" if result["load"] is None else f"{100 * result['load']:.0f} %"
    return share + " (too much for ratios; repeat on a quiet machine, or with --cpu-time)" * _is_busy(result)


def _layer_table(result):
    """Sorted by our time; the last line is the sum."""
    rows, unit = result["rows"], "CPU ms" if result["cpu_time"] else "ms"
    for row in rows:
        row["ms"] = [1e3 * row["count"] * median(seconds) for seconds in row["seconds"]]
    rows = sorted(rows, key=lambda row: -row["ms"][0])
    sums = [sum(column) for column in zip(*(row["ms"] for row in rows), strict=True)]
    lines = [f"| layer | times | by hand, {unit} | share | channels-first | channels-last | ratio to the faster |",
             "|---|---|---|---|---|---|---|"]
    for name, count, ms in [(row["name"], row["count"], row["ms"]) for row in rows] + [("all", "", sums)]:
        ours, *theirs = ms
        lines.append(f"| {name} | {count} | {ours:.1f} | {100 * ours / sums[0]:.0f} % "
                     f"| {theirs[0]:.1f} | {theirs[1]:.1f} "
                     f"| {'-' if _is_busy(result) else f'{ours / min(theirs):.2f}'} |")
    return lines


if __name__ == "__main__":
    main()
