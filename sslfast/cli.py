"""The `sslfast` command."""

import sys
from collections.abc import Callable
from pathlib import Path

NEEDS_TRAIN = {"tyro", "rich", "matplotlib", "PIL", "safetensors", "kornia", "mlxtend", "sklearn"}


def doctor() -> None:
    """Versions, devices, CPU features, and which backend serves each op here and why not the others."""
    from sslfast import doctor

    print(doctor.report())


def main(argv: list[str] | None = None) -> None:
    """Entry point. An error in what the user gave is one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["doctor"] and len(argv) == 1:  # needs nothing but the library
        return doctor()
    try:
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


def _parse_and_run(argv: list[str]) -> None:
    import tyro

    from sslfast.train.config import CONFIGS

    methods = tyro.extras.SubcommandApp()
    for name, config_type in CONFIGS.items():
        methods.command(name=name)(_trainer(name, config_type))
    if argv[:1] == ["train"]:
        methods.cli(prog="sslfast train", description="Train an encoder.", args=argv[1:])
        return
    commands: dict[str, Callable] = {"train": _list_methods, "eval": _evaluator(), "doctor": doctor}
    tyro.extras.subcommand_cli_from_dict(commands, prog="sslfast", args=argv)


def _trainer(method: str, config_type: type) -> Callable:
    import tyro

    def train(config: tyro.conf.OmitArgPrefixes[config_type]) -> None:  # type: ignore[valid-type]
        from sslfast.train import loop

        loop.train(method, config)

    train.__doc__ = config_type.__doc__
    return train


def _list_methods() -> None:
    """Train an encoder: `sslfast train METHOD --help` shows the options."""


def _evaluator() -> Callable:
    import tyro

    def evaluate(run: tyro.conf.Positional[Path], /) -> None:
        """Measure a run again: kNN, linear probe and 10 labels per class, beside two baselines."""
        from rich.console import Console

        from sslfast.train import config, data
        from sslfast.train import evaluate as evaluation

        method, cfg = config.load(run)
        evaluation.run(method, cfg, data.load(cfg.data, cfg.image_size), Console())

    return evaluate


if __name__ == "__main__":
    main()
