"""The `sslfast` command."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEEDS_TRAIN = {"tyro", "rich", "matplotlib", "PIL", "safetensors", "kornia", "mlxtend", "sklearn", "skimage"}


def doctor() -> None:
    """Versions, devices, CPU features, and which backend serves each op here and why not the others."""
    from sslfast import doctor

    print(doctor.report())


def _tune() -> Callable:
    from sslfast.tune import tune

    return tune


def main(argv: list[str] | None = None) -> None:
    """Entry point. An error in what the user gave is said on stderr with the option's name: exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv == ["doctor"]:  # needs nothing but the library
            return doctor()
        if argv == ["tune"]:
            return _tune()()
        _parse_and_run(argv)
    except ModuleNotFoundError as error:
        if error.name not in NEEDS_TRAIN:
            raise
        sys.exit(
            f"sslfast: {error.name} is missing; install the training extra: pip install 'sslfast[train]'"
        )
    except ValueError as error:
        print(f"sslfast: {error}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, OSError) as error:
        print(f"sslfast: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        print(f"sslfast: {stop or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


def _parse_and_run(argv: list[str]) -> None:
    import tyro

    from sslfast.train import methods as known

    methods = tyro.extras.SubcommandApp()
    for name in known.NAMES:
        methods.command(name=name)(_trainer(name, known.module(name).Config, argv))
    if argv[:1] == ["train"]:
        methods.cli(prog="sslfast train", description="Train an encoder.", args=argv[1:])
        return
    commands: dict[str, Callable] = {
        "train": _list_methods,
        "eval": _evaluator(),
        "tune": _tune(),
        "doctor": doctor,
    }
    tyro.extras.subcommand_cli_from_dict(commands, prog="sslfast", args=argv)


def _trainer(method: str, config_type: type, argv: list[str]) -> Callable:
    import tyro

    def train(config) -> None:
        from sslfast.train import loop

        loop.train(method, config)

    without_prefix: Any = tyro.conf.OmitArgPrefixes
    train.__annotations__["config"] = without_prefix[config_type]
    train.__doc__ = config_type.__doc__
    if argv[1:2] == [method]:
        train.__defaults__ = _resumed(method, argv)
    return train


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
    theirs, options = config.load(given.out)
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
        evaluation.run(method, cfg, sources.load(cfg.data, cfg.image_size), Console(), finetune)

    return evaluate


if __name__ == "__main__":
    main()
