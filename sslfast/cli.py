"""The `sslfast` command."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

NEEDS_TRAIN = {"tyro", "rich", "matplotlib", "PIL", "safetensors", "mlxtend", "sklearn", "skimage"}

PATIENCE = 5.0
"""Seconds in which the first process says what is wrong, before torchrun ends it as another has ended."""


def doctor() -> None:
    """Versions, devices, CPU features, and which backend serves each op here and why not the others."""
    from sslfast import doctor

    print(doctor.report())


def _bencher() -> Callable:
    from sslfast.bench.run import bench

    return bench


def _tune() -> Callable:
    from sslfast.tune import tune

    return tune


def main(argv: list[str] | None = None) -> None:
    """Entry point. An error in what the user gave is said on stderr with the option's name: exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if status := _status(lambda: _run(argv), _say):
        sys.exit(status)


def _status(run: Callable, say: Callable[[BaseException, str], None]) -> int:
    """Runs it, and returns its exit status; an error that a user can do something about is said."""
    try:
        run()
        return 0
    except ModuleNotFoundError as error:
        if error.name not in NEEDS_TRAIN:
            raise
        say(
            error,
            f"{error.name} is missing; pip install 'sslfast[train]', of bench and tune 'sslfast[bench]'",
        )
        return 1
    except ValueError as error:
        say(error, str(error))
        return 2
    except (FloatingPointError, OSError) as error:
        say(error, str(error))
        return 1
    except KeyboardInterrupt as stop:
        say(stop, str(stop) or "interrupted")
        return 130


def _say(error: BaseException, text: str) -> None:
    if _speaks() or isinstance(error, ConnectionError):
        print(f"sslfast: {text}", file=sys.stderr)
    else:
        time.sleep(PATIENCE)


def _speaks() -> bool:
    """Of the processes that torchrun starts on a machine, all with the same arguments, the first one."""
    return "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def _silence() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        except SystemExit as stop:
            time.sleep(PATIENCE if stop.code else 0)
            raise


def _run(argv: list[str]) -> None:
    if argv[:1] != ["train"] and os.environ.get("RANK", "0") != "0":
        return None  # of torchrun's processes the first does alone what is not shared
    if argv == ["doctor"]:  # needs nothing but the library
        return doctor()
    if argv == ["tune"]:
        return _tune()()
    _parse_and_run(argv)


def _parse_and_run(argv: list[str]) -> None:
    import tyro

    if argv[:1] == ["train"]:
        from sslfast.train import methods as known

        methods = tyro.extras.SubcommandApp()
        for name in known.NAMES:
            methods.command(name=name)(_trainer(name, known.module(name).Config, argv))
        with nullcontext() if _speaks() else _silence():
            run = methods.cli(prog="sslfast train", description="Train an encoder.", args=argv[1:])
        return run()
    commands: dict[str, Callable] = {
        "bench": _bencher(),
        "train": _list_methods,
        "eval": _evaluator(),
        "report": _reporter(),
        "tune": _tune(),
        "doctor": doctor,
    }
    tyro.extras.subcommand_cli_from_dict(commands, prog="sslfast", args=argv)


def _trainer(method: str, config_type: type, argv: list[str]) -> Callable:
    import tyro

    def train(config) -> Callable:
        return partial(_train, method, config)

    without_prefix: Any = tyro.conf.OmitArgPrefixes
    train.__annotations__["config"] = without_prefix[config_type]
    train.__doc__ = config_type.__doc__
    if argv[1:2] == [method]:
        train.__defaults__ = _resumed(method, argv)
    return train


def _train(method: str, config) -> None:
    from sslfast.train import loop, processes

    with processes.group(config.timeout_minutes):
        if status := _status(lambda: loop.train(method, config), processes.say):
            if processes.processes() > 1:  # what is left to do may wait for one that is gone
                sys.stdout.flush()
                os._exit(status)
            sys.exit(status)


def _resumed(method: str, argv: list[str]) -> tuple | None:
    """With --resume, the options of the run in --out as defaults, so that they need not be given again."""
    import argparse
    import dataclasses

    from sslfast.train import config

    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--out", type=Path)
    scan.add_argument("--resume", action="store_true")
    given, _ = scan.parse_known_args(argv)
    if not (given.resume and given.out and (given.out / "config.json").exists()):
        return None
    try:
        theirs, options = config.load(given.out)
    except ValueError:
        if os.environ.get("RANK", "0") == "0":  # whose config is that of all
            raise
        return None
    if theirs != method:
        raise ValueError(f"resume: the run in {given.out} is of {theirs}, got {method}")
    return (dataclasses.replace(options, resume=True),)


def _list_methods() -> None:
    """Train an encoder: `sslfast train METHOD --help` shows the options."""


def _evaluator() -> Callable:
    import tyro

    def evaluate(run: tyro.conf.Positional[Path], /, finetune: int = 0) -> None:
        """Measure a run again: kNN, linear probe and 10 labels per class, beside two baselines.

        Args:
            run: its folder.
            finetune: epochs of fine-tuning the whole encoder on all labels as well; 0: none.
        """
        from rich.console import Console

        from sslfast.train import config, sources
        from sslfast.train import evaluate as evaluation

        if finetune < 0:
            raise ValueError(f"finetune: expected a number of epochs, got {finetune}")
        method, cfg = config.load(run)
        dataset = sources.load(cfg.data, cfg.image_size, cfg.memory())
        evaluation.run(method, cfg, dataset, Console(), finetune)

    return evaluate


def _reporter() -> Callable:
    import tyro

    def report(runs: tyro.conf.Positional[tuple[Path, ...]], /, out: Path | None = None) -> None:
        """Show a run, or several side by side, as one HTML page, with its plots as PNGs beside it.

        Args:
            runs: their folders; unfinished ones too.
            out: the page; by default report.html, in the folder of a single run, otherwise here.
        """
        from sslfast.train import page

        if not runs:
            raise ValueError("runs: expected the folders of one run or more")
        print(f"wrote {page.report(runs, out)}")

    return report


if __name__ == "__main__":
    main()
