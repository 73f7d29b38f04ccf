"""Train a model: python -m ddpm.train --model gddm

Trains a U-Net with hand-written gradients on images, and leaves a run folder with the model, its samples, its bits per
dimension and, for a model with a variance, a picture of its uncertainty. With --from it trains no network but a small
head on the one in another run, which learns how far the prediction may be off: a variance for samples in few steps.
"""

import contextlib
import shlex
import signal
import time

from ddpm import config as configuration
from ddpm.commands import CommandParser, progress_bar, run_command
from ddpm.errors import UserError

SUMMARY_IMAGES, SUMMARY_STRATA, SAMPLE_STEPS = 128, 32, 250


def parser():
    """The command's flags: TrainConfig's, and where the run lives."""
    p = CommandParser(prog="python -m ddpm.train", description=__doc__)
    where = p.add_argument_group("where")
    where.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/MODEL-DATA-N); never overwritten")
    where.add_argument("--resume", metavar="RUN", help="go on with the run in that folder, with its own configuration; "
                       "settings that don't change what is trained (--steps, --workers, ...) may be given anew")
    where.add_argument("--from", metavar="RUN", dest="base", help="with --model sn, npr or ocm: the run whose network "
                       "the head stands on; its data and schedule come with it, and it stays as it is")
    configuration.add_flags(p)
    return p


def main(argv=None):
    """Train or resume as the flags say; returns the exit status."""
    flags = parser().parse_args(argv)
    if flags.resume and (flags.out or flags.base):
        raise UserError(f"--{'out' if flags.out else 'from'} and --resume exclude each other: a resumed run stays in "
                        "its folder, and a head on its network")
    from ddpm.runs import RunFolder
    if flags.base:
        from ddpm.head_training import head_config
        base = RunFolder.open(flags.base)
        return _train(head_config(base.config, base.path, configuration.given(flags)), None, flags.out, base)
    if not flags.resume:
        return _train(configuration.from_flags(flags), None, flags.out)
    with RunFolder.open(flags.resume, exclusive=True) as run:
        wanted = configuration.from_flags(flags, run.config)
        for name in wanted.differences(run.config):
            raise UserError(f"{configuration.flag(name)} can't change on resuming ({getattr(run.config, name)} in this "
                            f"run); start a new run with --out")
        run.config = wanted
        return _train(wanted, run, None)


def _train(config, run, out, base=None):
    from ddpm import data
    from ddpm.parallel import WorkerDied, make_group
    from ddpm.runs import CONFIG, RunFolder, write_atomically
    from nn.backend import keep_freed_memory
    keep_freed_memory()
    _check_objective(config)
    group = make_group(config.workers or None, config.device)
    if group.size > config.batch_size:
        raise UserError(f"--batch-size {config.batch_size} leaves some of {group.size} workers without an image; "
                        "use fewer --workers")
    dataset = data.load(config.data, config.data_dir)
    _check_images(config, dataset)
    trainer, start, spent = _trainer(config, dataset, group, run, base)
    if run:
        run.truncate_log(start)
        write_atomically(run.path / CONFIG, lambda file: file.write(config.to_json().encode()))
        print(f"resuming {run.path} after step {start} of {config.steps}")
    else:
        run = RunFolder.create(out, config)
    with run:
        session = _Session(config, run, trainer, dataset, spent)
        _describe(config, dataset, trainer, run, group)
        go_on = f"python -m ddpm.train --resume {shlex.quote(str(run.path))}"
        try:
            stopped_at = group.run(lambda group: session.train(start)) if start < config.steps else None
        except WorkerDied as death:
            raise UserError(f"{death}; the last checkpoint is intact, go on with: {go_on}") from death
        if stopped_at:
            print(f"stopped after step {stopped_at}; go on with: {go_on}")
            return 130
        _summarise(config, run, dataset)
    return 0


def _check_objective(config):
    """Raise for an objective that the model hasn't, before anything is loaded."""
    from ddpm.models import find_objective
    if config.backbone == "own":
        find_objective(config.model, config.objective)


def _trainer(config, dataset, group, run, base):
    """(Trainer, step it starts after, seconds spent so far): new, on the network of `base`, or as `run` was saved."""
    from ddpm.head_training import HeadTrainer, backbone_of
    from ddpm.models import arrays_below
    from ddpm.runs import CHECKPOINT, PREVIOUS
    from ddpm.training import Trainer
    saved = run and any((run.path / name).exists() for name in (CHECKPOINT, PREVIOUS))       # else killed before that
    arrays, metadata = run.load_checkpoint() if saved or (run and config.backbone != "own") else (None, None)
    if config.backbone == "own":
        trainer = Trainer(config, dataset, group)
    else:
        trainer = HeadTrainer(config, dataset, group, arrays_below("backbone/", arrays) if run else backbone_of(base))
    if not saved:
        return trainer, 0, 0.0
    if metadata.get("label_names") != trainer.label_names:
        raise UserError(f"--data {config.data} has other classes than this run was trained with "
                        f"({', '.join(metadata['label_names'])}); put its pictures back or start a new run")
    trainer.restore(arrays, metadata["counters"])
    return trainer, metadata["step"], metadata["seconds"]


class _Session:
    """The loop over steps on every rank; rank 0 also draws the bar, writes metrics and saves."""

    def __init__(self, config, run, trainer, dataset, spent):
        self.config, self.run, self.trainer, self.dataset = config, run, trainer, dataset
        self.started = time.monotonic() - spent
        self.interrupted = False

    def train(self, start):
        """Train steps start+1..steps; returns the last step if somebody asked to stop before the end, else None."""
        from ddpm.training import NotFinite
        try:
            return self._steps(start)
        except NotFinite as error:
            raise UserError(f"{error}; the checkpoint of the last save is intact in {self.run.path}: train again with "
                            "a smaller --lr or another --objective") from None

    def _steps(self, start):
        boss, config = self.trainer.group.rank == 0, self.config
        with self._signals(boss), progress_bar(config.steps - start, "training", "step", boss) as bar:
            if boss and start == 0:
                self._save(0)
            seconds = time.monotonic()
            for step in range(start + 1, config.steps + 1):
                result = self.trainer.step(step, stop=self.interrupted)
                if boss:
                    now = time.monotonic()
                    rate, seconds = config.batch_size / (now - seconds), now
                    bar.set_postfix_str(f"loss {result.loss:.3f}, {rate:.0f} images/s", refresh=False)
                    bar.update()
                    if step % config.log_every == 0 or step == config.steps:
                        self.run.log(step=step, loss=result.loss, seconds=now - self.started, images_per_second=rate,
                                     grad_norm=result.grad_norm, lr=self.trainer.adam.lr)
                if step % config.save_every == 0 or step == config.steps or result.stop:
                    self.trainer.gather()
                    if boss:
                        self._save(step)
                if result.stop and step < config.steps:
                    return step
        return None

    def _save(self, step):
        import numpy as np

        from ddpm.training import NotFinite
        from nn.backend import to_host
        arrays, counters = self.trainer.state()
        if not all(bool(np.isfinite(to_host(a)).all()) for a in arrays.values()):
            raise NotFinite(f"the parameters are no longer finite at step {step}")
        self.run.save_checkpoint(arrays, {
            "step": step, "seconds": time.monotonic() - self.started, "counters": counters,
            "image_shape": list(self.dataset.image_shape), "levels": self.dataset.levels,
            "label_names": self.trainer.label_names})

    @contextlib.contextmanager
    def _signals(self, boss):
        """The first Ctrl-C (or SIGTERM) asks all ranks to stop after this step and save; the second stops at once."""
        if not boss:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)       # batch systems send it to every process: rank 0 decides
            yield
            return

        def ask(number, frame):
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _check_images(config, dataset):
    """Raise before anything is written if the U-Net can't take these images."""
    H, W, _ = dataset.image_shape
    factor = 2**(len(config.channel_mults) - 1)
    if H % factor or W % factor:
        raise UserError(f"images of {H}x{W} can't be halved {len(config.channel_mults) - 1} times; use fewer levels: "
                        f"--channel-mults with height and width divisible by 2 per level after the first")
    if len(dataset.train_images) == 0 or len(dataset.test_images) == 0:
        raise UserError(f"--data {config.data} has no images for training or none for testing; add more images")


def _describe(config, dataset, trainer, run, group):
    H, W, C = dataset.image_shape
    classes = f" in {len(trainer.label_names)} classes" if config.conditional else ""
    name = config.model if config.backbone == "own" else f"{config.model}, a head on a trained {config.backbone},"
    print(f"{name} on {config.data}: {len(dataset.train_images)} images of {H}x{W}x{C}{classes}, "
          f"{trainer.network.num_parameters:,} parameters, T={config.T}, {group.size} worker{'s' * (group.size > 1)}")
    print(f"run folder: {run.path}")


def _summarise(config, run, dataset):
    """Bits/dim of test images, samples, curves and (with a variance) uncertainty of the trained model."""
    from ddpm import plots
    from ddpm.models import default_variance, load_denoiser
    from ddpm.parallel import make_group
    from ddpm.report import draw_samples, measure_bits, one_of_each
    from ddpm.variance import default_decoder
    denoiser, metadata = load_denoiser(run, config.device)
    variance = default_variance(config.model)

    def fresh():
        return make_group(config.workers or None, config.device)

    bits = measure_bits(denoiser, dataset, SUMMARY_IMAGES, run.path, fresh(), variance=variance, strata=SUMMARY_STRATA,
                        decoder=default_decoder(config, variance))
    plots.save(plots.training_curves(run.metrics(), f"{config.model} on {config.data}"), run.path / "curves.png")
    pictures = ["curves.png", "bits.png"]
    if config.samples:
        _, drawn = draw_samples(denoiser, dataset.image_shape, config.samples, run.path, fresh(),
                                steps=min(SAMPLE_STEPS, config.T), variance=variance, seed=config.seed,
                                **one_of_each(metadata.get("label_names"), config.samples))
        pictures = drawn + pictures
    parts, without, asked = bits.summary(), "", ""
    if config.conditional:
        without, asked = " without their labels", " --label all --guidance-scale 2"
    print(f"test bits/dim {parts['bits_per_dim']:.3f} ± {parts['standard_error']:.3f} (prior {parts['prior']:.3f}, "
          f"steps {parts['steps']:.3f}, decoder {parts['decoder']:.3f}; {len(bits.total)} images{without})")
    print(f"results in {run.path}: {', '.join(pictures)}")
    print(f"next: python -m ddpm.sample {run.path} --num 16 --steps {min(50, config.T)}{asked}, "
          f"or python -m ddpm.evaluate bpd {run.path}")


if __name__ == "__main__":
    run_command(main)
