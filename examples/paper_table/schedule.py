"""Which jobs there are, which are done, and running what is pending as far as the time goes."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from fnmatch import fnmatchcase

from examples.paper_table.context import Context
from examples.paper_table.jobs import RowJob, Stage1, TeacherStage
from examples.paper_table.presets import Preset
from examples.paper_table.rows import FORMS, all_rows
from examples.paper_table.storage import Storage
from examples.paper_table.training import OutOfTimeError

Job = TeacherStage | Stage1 | RowJob


def all_jobs(preset: Preset) -> list[Job]:
    """Every job, those worth having first."""
    rows = all_rows()
    more_seeds = [RowJob(row, seed) for seed in range(1, preset.seeds) for row in rows if row.decides]
    return [
        *(TeacherStage(i) for i in range(preset.teacher_stages)),
        *(Stage1(form) for form in FORMS),
        *(RowJob(row) for row in rows),
        *more_seeds,
    ]


def missing_needs(job: Job, done: set[str], preset: Preset) -> list[str]:
    needs = [f"teacher-{preset.teacher_stages - 1}" if need == "teacher" else need for need in job.needs]
    return [need for need in needs if need not in done]


def pending(preset: Preset, storage: Storage, patterns: tuple[str, ...]) -> Iterator[Job]:
    """Jobs that are not done and match a pattern, in order."""
    for job in all_jobs(preset):
        if storage.result(job.name) is None and any(fnmatchcase(job.name, pattern) for pattern in patterns):
            yield job


def expected_seconds(job: Job, storage: Storage, preset: Preset) -> float:
    """As long as the longest job of its kind took, or the preset's guess."""
    kinds = {each.name: type(each) for each in all_jobs(preset)}
    known = [result["seconds"] for name, result in storage.all_results().items() if kinds.get(name) is type(job)]
    return max(known, default=preset.job_seconds)


def run_jobs(context: Context, patterns: tuple[str, ...]) -> list[str]:
    """Run what is pending, as far as the time goes; the names of jobs that failed."""
    preset, storage = context.preset, context.storage
    failed = []
    for job in list(pending(preset, storage, patterns)):
        if missing := missing_needs(job, set(storage.all_results()), preset):
            print(f"{job.name}: waits for {', '.join(missing)}", flush=True)
            continue
        left, expected = context.deadline - time.monotonic(), expected_seconds(job, storage, preset)
        if left < expected:
            print(f"{job.name}: {left:.0f} s are left, too few to begin what takes about {expected:.0f}", flush=True)
            break
        print(f"{job.name}: begins, {left:.0f} s are left", flush=True)
        start = time.monotonic()
        try:
            result = job.run(context)
        except OutOfTimeError:
            print(f"{job.name}: stopped, goes on from its checkpoint in {storage.unfinished}", flush=True)
            break
        except Exception:
            # What other rows need must not be lost with this one.
            traceback.print_exc()
            failed.append(job.name)
            continue
        seconds = time.monotonic() - start
        storage.write_result(job.name, {**result, "preset": preset.name, "seconds": seconds, **context.machine()})
        print(f"{job.name}: done in {seconds:.0f} s; {result.get('measures', '')}", flush=True)
    return failed
