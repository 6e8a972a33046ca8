"""The folder of a run: starting, saving, going on where it was stopped."""

import shutil
import signal
import threading
import time

import torch
from rich.console import Console

from sslfast.train import checkpoint, config, processes
from sslfast.train.config import TrainConfig

CHECKPOINT, WEIGHTS = "checkpoint.safetensors", "weights.safetensors"
RECONSTRUCTION = "reconstruction.png"
ATTENTION, COMPONENTS = "attention.png", "components.png"
VIEWS, NEIGHBOURS, FEATURES, REPORT = "views.png", "neighbours.png", "features.safetensors", "report.html"
FILES = (
    *(CHECKPOINT, WEIGHTS, "metrics.csv", "evaluation.json", FEATURES, REPORT, "loss.png", VIEWS, NEIGHBOURS),
    *(RECONSTRUCTION, ATTENTION, COMPONENTS, "config.json"),
)
FOLDERS = ("tensorboard", "report-plots", "wandb")
REMAINS = tuple(f"{name}.tmp" for name in FILES)  # of a process that was killed while it wrote


class Run:
    """`cfg.out` with its config, and checkpoints of everything in `parts`.

    Args:
        images: what tells the training images from others; a run goes on with the same only.
        parts: objects with state_dict and load_state_dict, by name.
    """

    def __init__(
        self,
        method: str,
        cfg: TrainConfig,
        images: list[int],
        device: torch.device,
        parts: dict,
        console: Console,
    ) -> None:
        self.method, self.cfg, self.device, self.parts, self.console = method, cfg, device, parts, console
        self.identity = {**config.identity(method, cfg), "images": images}
        self.path = cfg.out / CHECKPOINT
        self._saved_at = time.monotonic()

    def start(self) -> int:
        """Begins a new run, or goes on with one; returns how many updates were made.

        The first process alone looks into the folder, and sends the others what is in the checkpoint.

        Raises:
            ValueError: the folder holds something else, the checkpoint is not one of this run, or processes
                have different images.
        """
        with processes.together():
            for number, images in enumerate(processes.collected(self.identity["images"])):
                if images != self.identity["images"]:
                    raise ValueError(
                        f"data: process {number} has other images than process {processes.rank()}"
                    )
        state = None
        with processes.together():
            if processes.rank() == 0:
                state = self._begin()
        state = processes.first_state(state)
        return 0 if state is None else self._restore(state)

    def _begin(self) -> dict | None:
        """The checkpoint of a run that goes on, or the folder for a new one."""
        out, cfg = self.cfg.out, self.cfg
        held = (out / "config.json").exists()
        if held and cfg.resume and self.path.exists():
            return self._load()
        if held and not (cfg.overwrite or cfg.resume):
            raise ValueError(
                f"out: {out} already holds a run; expected a new folder, --resume or --overwrite"
            )
        if held:
            self._clear()
        elif out.exists() and (not out.is_dir() or any(p.name not in REMAINS for p in out.iterdir())):
            raise ValueError(f"out: expected a new or empty folder, got {out}")
        if cfg.resume:
            self.console.print(f"no checkpoint in {out} yet: starting from the beginning")
        out.mkdir(parents=True, exist_ok=True)
        config.save(self.method, cfg, out / "config.json")
        return None

    def _clear(self) -> None:
        """Removes the files of an earlier run and nothing else; the config, which shows what it was, last."""
        out = self.cfg.out
        config.load(out)  # raises for another program's config.json
        for name in FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (*REMAINS, *FILES):
            (out / name).unlink(missing_ok=True)

    def due(self) -> bool:
        """Whether the last checkpoint is older than checkpoint_minutes."""
        return time.monotonic() - self._saved_at >= 60 * self.cfg.checkpoint_minutes

    def save(self, done: int) -> None:
        """Writes a checkpoint after `done` updates; where that fails, the last one stays and training goes
        on. All processes call it, and the first writes what is the same on all, and their random states.

        Raises:
            FloatingPointError: the loss or a weight is not finite; the last good state stays.
        """
        self.parts["log"].check()
        with processes.together():
            for name, value in self.parts["model"].state_dict().items():
                if value.is_floating_point() and not value.isfinite().all():
                    raise FloatingPointError(
                        f"{name} is not finite after update {done}; try a lower --learning-rate"
                    )
        random, *others = processes.collected(checkpoint.random_state(self.device))
        state = {
            "identity": self.identity,
            "done": done,
            "threads": torch.get_num_threads(),
            "random": random,
            **({"others": others} if others else {}),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        with processes.together():
            if processes.rank() == 0:
                self._write(state)
        self._saved_at = time.monotonic()

    def _write(self, state: dict) -> None:
        try:
            checkpoint.save(self.path, state)
        except OSError as error:
            self.console.print(
                f"[bold red]warning:[/] {error}; the checkpoint before it stays", highlight=False
            )

    def _load(self) -> dict:
        state = checkpoint.load(self.path)
        theirs = state.get("identity", {})
        if theirs:  # from before it could be chosen, which changed nothing for the one process there was
            theirs.setdefault("sync_batchnorm", self.identity["sync_batchnorm"])
        for name in sorted({*theirs, *self.identity}):
            if theirs.get(name) != self.identity.get(name):
                raise ValueError(
                    f"resume: the run in {self.cfg.out} has {name} = {theirs.get(name)!r}, "
                    f"got {self.identity.get(name)!r}"
                )
        return state

    def _restore(self, state: dict) -> int:
        count = processes.processes()
        with processes.together():
            try:
                for name, part in self.parts.items():
                    part.load_state_dict(state[name])
                states = [state["random"], *state.get("others", ())]
                if len(states) == count:
                    checkpoint.set_random_state(states[processes.rank()], self.device)
                else:
                    checkpoint.reseed(self.cfg.seed, processes.rank(), state["done"])
            except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
                raise ValueError(f"resume: {self.path} is not of this version: {error}") from error
        if len(states) != count:
            self.console.print(
                f"processes: {len(states)} before, now {count}; the run goes on with new random numbers"
            )
        if state["threads"] != torch.get_num_threads():
            self.console.print(
                f"the run had {state['threads']} threads and now has {torch.get_num_threads()}: "
                f"it will not end with bitwise the same weights"
            )
        self.console.print(f"going on after update {state['done']}")
        return state["done"]


class Interruption:
    """Ctrl-C and SIGTERM are a request that the loop sees between updates; a second interrupts at once.

    Not where torchrun is, which passes on what its processes got from the terminal already, and ends those
    that remain when one has ended: what they have to say comes first.
    """

    def __init__(self, command: str) -> None:
        self.requested, self._command = False, command

    def __enter__(self) -> "Interruption":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is not None and processes.processes() > 1:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if self.requested and not processes.launched():
            raise KeyboardInterrupt
        self.requested = True

    def stop_here(self, agreed: bool | None = None) -> None:
        """Raises KeyboardInterrupt, with how to go on, where it was requested, or all processes agreed to."""
        if self.requested if agreed is None else agreed:
            raise processes.everywhere(KeyboardInterrupt(f"stopped and saved; to go on: {self._command}"))
