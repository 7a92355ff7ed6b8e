"""Which jobs there are, which are done, and running what is pending as far as the time goes."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
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
    """Jobs that are not done and match a pattern, in order, those that failed before last."""
    for job in sorted(all_jobs(preset), key=lambda job: storage.has_failed(job.name)):
        if storage.result(job.name) is None and any(fnmatchcase(job.name, pattern) for pattern in patterns):
            yield job


def expected_seconds(job: Job, storage: Storage, preset: Preset) -> float:
    """As long as the longest job of its kind took, or the preset's guess."""
    kinds = {each.name: _kind(each) for each in all_jobs(preset)}
    known = [result["seconds"] for name, result in storage.all_results().items() if kinds.get(name) == _kind(job)]
    return max(known, default=preset.job_seconds)


def _kind(job: Job) -> tuple[type, bool]:
    return type(job), isinstance(job, RowJob) and not job.row.trained


def run_jobs(
    context: Context,
    patterns: tuple[str, ...],
    on_result: Callable[[], None] = lambda: None,
    job_seconds: float | None = None,
) -> list[str]:
    """Run what is pending, as far as the time goes; other processes may do the same with the same files.

    Args:
        context: what jobs share.
        patterns: names of jobs to run.
        on_result: called after every job that is done.
        job_seconds: what a job is thought to take, so that none is begun too late; None: as `expected_seconds`.

    Returns:
        The names of jobs that failed. After one that took the device along there are no more.
    """
    preset, storage = context.preset, context.storage
    failed: list[str] = []
    told: set[str] = set()

    def tell(text: str) -> None:
        if text not in told:
            told.add(text)
            print(text, flush=True)

    while True:
        has_run = is_shared = is_blocked = False
        for job in pending(preset, storage, patterns):
            if job.name in failed:
                continue
            expected = job_seconds or expected_seconds(job, storage, preset)
            if context.deadline - time.monotonic() < expected:
                tell(f"{job.name}: too few seconds are left to begin what takes about {expected:.0f}")
                continue
            if missing := missing_needs(job, set(storage.all_results()), preset):
                tell(f"{job.name}: waits for {', '.join(missing)}")
                is_blocked = True
                continue
            with storage.claimed(job.name) as is_mine:
                is_shared |= not is_mine
                # Another process may have finished it just now.
                if not is_mine or storage.result(job.name) is not None:
                    continue
                try:
                    _run(job, context)
                except OutOfTimeError:
                    print(f"{job.name}: stopped, goes on from its checkpoint in {storage.unfinished}", flush=True)
                    return failed
                except Exception:
                    # What other rows need must not be lost with this one.
                    traceback.print_exc()
                    storage.note_failure(job.name)
                    failed.append(job.name)
                    if not context.device_works():
                        print("the device is of no more use to this process; another one can go on", flush=True)
                        return failed
                    continue
            on_result()
            # What is worth most may have become possible.
            has_run = True
            break
        if not has_run and not (is_shared and is_blocked):
            return failed
        if not has_run:
            time.sleep(1)


def _run(job: Job, context: Context) -> None:
    storage = context.storage
    print(f"{job.name}: begins, {context.deadline - time.monotonic():.0f} s are left", flush=True)
    start, alone = time.monotonic(), not storage.others_at_work(job.name)
    result = job.run(context)
    seconds, alone = time.monotonic() - start, alone and not storage.others_at_work(job.name)
    about = {"preset": context.preset.name, "seconds": seconds, "alone": alone, **context.machine()}
    storage.write_result(job.name, {**result, **about})
    print(f"{job.name}: done in {seconds:.0f} s; {result.get('measures', '')}", flush=True)
