"""Where results and checkpoints lie, and how they travel between machines.

`results/` holds a small JSON file per job, frames, and what stage 1 learned; it is kept in the repository. `work/`
holds the pictures and the teacher in training; it is not. A machine that is lent for minutes gets `work/` and gives
back a bundle: one archive and the shards of the teacher, none of them large.
"""

from __future__ import annotations

import fcntl
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
SHARD_BYTES = 15 * 2**20


class Storage:
    """The files of one preset.

    Args:
        preset: its name.
        root: folder that holds `results` and `work`.
    """

    def __init__(self, preset: str, root: Path = HERE) -> None:
        self.results, self.work = root / "results" / preset, root / "work" / preset
        self.unfinished = self.work / "unfinished"
        for folder in (self.results, self.unfinished):
            folder.mkdir(parents=True, exist_ok=True)

    def result(self, job: str) -> dict[str, Any] | None:
        path = self.results / f"{job}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write_result(self, job: str, content: Mapping[str, Any]) -> None:
        write_whole(self.results / f"{job}.json", (json.dumps(content, indent=1) + "\n").encode())

    def all_results(self) -> dict[str, dict[str, Any]]:
        return {path.stem: json.loads(path.read_text()) for path in sorted(self.results.glob("*.json"))}

    # Several processes at work

    @contextmanager
    def claimed(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether `name` is this process's alone inside. The claim ends with the process, however that ends."""
        with self._lock(name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def others_at_work(self, own: str) -> bool:
        """Whether any job but `own` is claimed now."""
        for path in self.unfinished.glob("*.lock"):
            if path != self._lock(own):
                with self.claimed(path.stem) as is_free:
                    if not is_free:
                        return True
        return False

    def _lock(self, name: str) -> Path:
        return self.unfinished / f"{name}.lock"

    def has_failed(self, job: str) -> bool:
        return self._failure(job).exists()

    def note_failure(self, job: str) -> None:
        self._failure(job).touch()

    def _failure(self, job: str) -> Path:
        return self.unfinished / f"{job}.failed"

    # Weights in bfloat16, in shards

    def write_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Write tensors, floating ones rounded to bfloat16, as `name.0` and so on, and remove those of other names."""
        buffer = io.BytesIO()
        torch.save({key: _rounded(x).detach().cpu() for key, x in weights.items()}, buffer)
        content = buffer.getvalue()
        for number, start in enumerate(range(0, len(content), SHARD_BYTES)):
            write_whole(self.work / f"{name}.{number}", content[start : start + SHARD_BYTES])
        stem = name.partition("-")[0]
        for path in self.work.glob(f"{stem}-*"):
            if path.is_file() and path.stem != name:
                path.unlink()

    def read_weights(self, name: str) -> dict[str, Tensor] | None:
        """What `write_weights` wrote, in float32; None where there is none."""
        shards = sorted(self.work.glob(f"{name}.*"), key=lambda path: int(path.suffix[1:]))
        if not shards:
            return None
        content = io.BytesIO(b"".join(path.read_bytes() for path in shards))
        weights: dict[str, Tensor] = torch.load(content, weights_only=True)
        return {key: _widened(x) for key, x in weights.items()}

    # What stage 1 learned, in bfloat16; it is kept in the repository, for rows that come later

    def write_learned(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        found = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
        write_whole(self._learned(name), save({key: _rounded(x) for key, x in found.items()}))

    def read_learned(self, name: str) -> dict[str, Tensor]:
        """What `write_learned` wrote, in float32."""
        from safetensors.torch import load_file

        return {key: _widened(x) for key, x in load_file(self._learned(name)).items()}

    def _learned(self, name: str) -> Path:
        return self.results / f"{name}.safetensors"

    # Transport

    def write_bundle(self, folder: Path) -> None:
        """Put everything but the pictures and unfinished work into few files of limited size, or bring them up to date.

        Every file is there whole at any time, so a run that is killed loses only the job it was at.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with self.claimed("bundle", wait=True):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
                for kind in ("json", "png", "safetensors"):
                    for path in sorted(self.results.glob(f"*.{kind}")):
                        archive.add(path, f"results/{path.name}")
            write_whole(folder / "bundle.tar.gz", buffer.getvalue())
            shards = {path.name: path for path in self.work.glob("teacher-*") if path.suffix != ".part"}
            for name, path in shards.items():
                if not (folder / name).exists():
                    write_whole(folder / name, path.read_bytes())
            for path in folder.glob("teacher-*"):
                if path.name not in shards:
                    path.unlink()

    def read_bundle(self, folder: Path) -> list[str]:
        """Take in what `write_bundle` wrote; the names of the results that were not there."""
        before = set(self.all_results())
        with tarfile.open(folder / "bundle.tar.gz") as archive:
            for member in archive.getmembers():
                kind, _, name = member.name.partition("/")
                content = archive.extractfile(member)
                if kind != "results" or "/" in name or content is None:
                    raise ValueError(f"bundle: expected files in results/, got {member.name!r}")
                write_whole(self.results / name, content.read())
        shards = sorted(folder.glob("teacher-*"))
        if shards:
            for old in self.work.glob("teacher-*"):
                old.unlink()
        for path in shards:
            write_whole(self.work / path.name, path.read_bytes())
        return sorted(set(self.all_results()) - before)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16) if x.is_floating_point() else x


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there either whole or not at all."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)
