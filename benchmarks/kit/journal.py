"""What a long run leaves as it goes: figures as lines of JSON, and the state of the training under way.

A run that was killed at any moment goes on from here, and ends as it would have without that. What was
damaged since then is named and done again: lines and checkpoints have checksums, for neither JSON nor Orbax
notices a flipped bit in a number.
"""

import hashlib
import json
import os
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx

from benchmarks.kit.files import UserError, read_file, write_files

LINES = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
CHECKPOINT_SECONDS = 60.0  # what a kill may cost; saving takes a tenth of a second and more
KEPT = 2  # checkpoints: the older one is for the case that the last is damaged

Record = dict[str, Any]

FINISHED: Record = {"finished": True}


class Journal:
    """The records of a run's trainings, one after another.

    The file `metrics.jsonl` has a line with the run's settings, then for each training one for each of its
    points, one with the digest of each checkpoint and one with its result, and one at the end of a finished
    run. The folder `checkpoints` has the last states of the training under way.
    """

    def __init__(
        self, folder: Path, settings: Record, *, resume: bool, pause: float = CHECKPOINT_SECONDS
    ) -> None:
        """Opens the journal of a run. One that was finished, or had hardly begun, gives way to a new one.

        Args:
            folder: Where it is, or will be.
            settings: Those of the run, ready for JSON.
            resume: Whether to go on with the run that the folder holds, if it holds one.
            pause: Seconds between two states of a training that are kept.

        Raises:
            UserError: There is a run with other settings, or an unfinished one and `resume` is not set, or
                what there is cannot be read or written.
        """
        self._path, self._folder = folder / LINES, folder / CHECKPOINTS
        self._training, self._pause, self._last_save = "", pause, 0.0
        self._lines = _read(self._path)
        if len(self._lines) == 1 or (self._lines[-1:] == [FINISHED] and not resume):
            self._lines = []
        wanted = json.loads(json.dumps({"settings": settings}))
        if self._lines and not resume:
            raise UserError(f"{folder} has a run already: go on with it by --resume, or remove it")
        if self._lines and self._lines[0] != wanted:
            raise UserError(f"{folder} has a run with other settings: {_difference(self._lines[0], wanted)}")
        if not self._lines:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lines = [wanted]
        self._rewrite()  # without a line that was torn
        self._results = {line["training"]: line["result"] for line in self._lines if "result" in line}

    def done(self, training: str) -> bool:
        """Whether the result of a training is on record."""
        return training in self._results

    def once(
        self, training: str, compute: Callable[[], Record], tell: Callable[[Record], object] = bool
    ) -> Record:
        """The result of a training: the one on record, or else a new one.

        Args:
            training: Its name, of which there is one in a run.
            compute: Does the training. It may call `restore` and `save`.
            tell: Called with a new result.
        """
        if self.done(training):
            return self._results[training]
        self._training, self._last_save = training, time.monotonic()
        result = json.loads(json.dumps(compute()))
        self._append({"training": training, "result": result})
        self._results[training] = result
        tell(result)
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        return result

    def save(self, step: int, state: nnx.State, figures: Record) -> None:
        """Keeps what was measured of the training under way, and every so often its state.

        Args:
            step: How many steps were taken.
            state: The state after them.
            figures: What was measured then.
        """
        # The line comes first: one too many is dropped on return, one too few would be missed.
        self._append({"training": self._training, "step": step, "figures": figures})
        if time.monotonic() - self._last_save < self._pause:
            return
        self._last_save = time.monotonic()
        with self._manager() as manager:
            manager.save(step, args=ocp.args.StandardSave(state))
        # A checkpoint without this line was not finished.
        digest = _digest(self._checkpoints / str(step))
        self._append({"training": self._training, "step": step, "digest": digest})

    def restore(self, like: nnx.State) -> tuple[int, nnx.State, list[Record]] | None:
        """The last state of the training under way that is as it was saved.

        Args:
            like: A state of the same structure.

        Returns:
            The number of steps taken, the state, and the figures until then; None before the first is saved.
        """
        step, state = self._last(like) if self._checkpoints.exists() else (0, None)
        later = [line for line in self._of_training() if line.get("step", 0) > step]
        if later:
            self._lines = [line for line in self._lines if line not in later]
            self._rewrite()
        figures = [line["figures"] for line in self._of_training() if "figures" in line]
        return None if state is None else (step, state, figures)

    def _last(self, like: nnx.State) -> tuple[int, nnx.State | None]:
        digests = {line["step"]: line["digest"] for line in self._of_training() if "digest" in line}
        with self._manager() as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                path = self._checkpoints / str(step)
                if digests.get(step) == _digest(path):
                    return step, manager.restore(step, args=ocp.args.StandardRestore(like))
                if step in digests:
                    warnings.warn(f"{path} is damaged and is left out", stacklevel=2)
                manager.delete(step)
        return 0, None

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self._checkpoints.absolute(), options=options)

    @property
    def _checkpoints(self) -> Path:
        return self._folder / re.sub(r"[^\w.-]+", "-", self._training)

    def _of_training(self) -> list[Record]:
        return [line for line in self._lines if line.get("training") == self._training]

    def _append(self, line: Record) -> None:
        self._lines.append(line)
        _append(self._path, line)

    def _rewrite(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self._path.parent}: {error.strerror}") from error
        write_files({self._path: "".join(_dump(line) + "\n" for line in self._lines)})


def finish(folder: Path) -> None:
    """Marks the run in a folder as finished: what it found is written, and there is nothing left to lose."""
    if _read(folder / LINES)[-1:] != [FINISHED]:
        _append(folder / LINES, FINISHED)


def _append(path: Path, line: Record) -> None:
    try:
        with path.open("a") as file:
            file.write(_dump(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _read(path: Path) -> list[Record]:
    """The lines of a file, if there is one, without the last if it is torn, nor what damage makes useless."""
    if not path.exists():
        return []
    *whole, _ = read_file(path).split(b"\n")
    lines: list[Record] = []
    damaged = False
    for number, text in enumerate(whole, 1):
        line = _parse(text)
        if line is None:
            if number == 1:
                raise UserError(f"cannot read {path}: line 1 is damaged; remove the file to start over")
            damaged = True
            warnings.warn(f"{path}, line {number} is damaged: what it said is computed again", stacklevel=3)
        elif not damaged or "result" in line:  # points and checkpoints need the points before them
            lines.append(line)
    return lines


def _dump(line: Record) -> str:
    return json.dumps(line | {"crc32": zlib.crc32(json.dumps(line).encode())})


def _parse(text: bytes) -> Record | None:
    """What a line says, if it is as it was written."""
    try:
        line = json.loads(text)
        del line["crc32"]
        return line if _dump(line).encode() == text else None
    except (KeyError, TypeError, ValueError):
        return None


def _digest(folder: Path) -> str:
    """SHA-256 over the names and digests of a folder's files."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{content} {path.relative_to(folder)}\n".encode())
    return whole.hexdigest()


def _difference(old: Record, new: Record) -> str:
    old, new = old.get("settings", {}), new["settings"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)}, not {new.get(name)}" for name in names)
