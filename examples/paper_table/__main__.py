"""Build the table in pieces:

    python -m examples.paper_table pictures                      # once, where the packages that ship them are installed
    python -m examples.paper_table plan                          # what is done, what is missing, and how long it takes
    python -m examples.paper_table run --budget-seconds 540 --bundle DIR      # as many jobs as the time allows
    python -m examples.paper_table collect DIR                   # take in what a run on another machine brought back
    python -m examples.paper_table publish                       # round the trained teacher into teacher.safetensors
    python -m examples.paper_table frames                        # clips of the rows without training, on any machine
    python -m examples.paper_table report                        # write docs/paper_table.md

`--tiny` does the same in a size that shows that everything runs; its numbers mean nothing. So does `--rehearsal` at the
full size with a step of everything: it finds what does not run on a machine, and leaves compiled code in the caches.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate

from examples.paper_table.context import Context
from examples.paper_table.frames import make_frames
from examples.paper_table.presets import FULL, REHEARSAL, TINY, Preset
from examples.paper_table.published import TEACHER, write_teacher
from examples.paper_table.schedule import all_jobs, pending, run_jobs
from examples.paper_table.storage import HERE, Storage
from examples.video_dit.photographs import gather, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    sizes = common.add_mutually_exclusive_group()
    sizes.add_argument("--tiny", action="store_true", help="the size for a CPU; its numbers mean nothing")
    sizes.add_argument("--rehearsal", action="store_true", help="one step of everything at the full size; likewise")
    common.add_argument("--root", type=Path, default=HERE, help="folder of results and work (default: this one)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pictures", parents=[common], help="pack the photographs and digits into one file")
    commands.add_parser("plan", parents=[common], help="list the jobs")
    run = commands.add_parser("run", parents=[common], help="run jobs that are not done")
    run.add_argument("--budget-seconds", type=float, default=1500, help="stop cleanly after this time (default: 1500)")
    run.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of jobs (fnmatch)")
    run.add_argument(
        "--job-seconds",
        type=float,
        help="begin no job with less time left (default: what the longest took)",
    )
    run.add_argument("--bundle", type=Path, help="after every job put all that must come back into this folder")
    run.add_argument("--device", default=DEVICE)
    collect = commands.add_parser("collect", parents=[common], help="take in a bundle")
    collect.add_argument("folder", type=Path)
    commands.add_parser("publish", parents=[common], help="write the trained teacher in 8 bits beside this file")
    frames = commands.add_parser("frames", parents=[common], help="make the frames of rows that need no training")
    frames.add_argument("--device", default=DEVICE)
    report = commands.add_parser("report", parents=[common], help="write the page and its pictures")
    report.add_argument("--docs", type=Path, help="folder of the page (default: docs; for other sizes, their work)")
    return parser.parse_args(arguments)


def show_plan(preset: Preset, storage: Storage) -> None:
    jobs, results = all_jobs(preset), storage.all_results()
    missing = {job.name for job in pending(preset, storage, ("*",))}
    for job in jobs:
        seconds = results.get(job.name, {}).get("seconds")
        print(f"{job.name:<44} {'missing' if job.name in missing else f'done in {seconds:.0f} s'}")
    known = [result["seconds"] for result in results.values()]
    each = sum(known) / len(known) if known else preset.job_seconds
    print(f"{len(jobs) - len(missing)} of {len(jobs)} jobs are done; the others need about {each * len(missing):.0f} s")


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    args = parse(arguments)
    preset = TINY if args.tiny else REHEARSAL if args.rehearsal else FULL
    storage = Storage(preset.name, args.root)
    if args.command == "pictures":
        path = storage.work / "pictures.npz"
        pack(gather(preset.model.num_labels), path)
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    elif args.command == "plan":
        show_plan(preset, storage)
    elif args.command == "collect":
        print("new:", ", ".join(storage.read_bundle(args.folder)) or "nothing")
    elif args.command == "publish":
        weights = storage.read_weights(f"teacher-{preset.teacher_stages - 1}")
        if weights is None:
            raise SystemExit(f"expected the teacher in {storage.work}; its last stage is not done")
        path = TEACHER if preset is FULL else storage.work / TEACHER.name
        write_teacher(weights, path)
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    elif args.command == "frames":
        context = Context(preset, storage, args.device, math.inf)
        print(tabulate(make_frames(context), ["from the teacher's noise", "PSNR against it, dB"], floatfmt=".1f"))
    elif args.command == "report":
        from examples.paper_table.report import write_report

        docs = HERE.parents[1] / "docs" if preset is FULL else storage.work
        print(write_report(preset, storage, args.docs or docs))
    else:
        torch.set_float32_matmul_precision("high")
        context = Context(preset, storage, args.device, start + args.budget_seconds)

        def update_bundle() -> None:
            if args.bundle:
                storage.write_bundle(args.bundle)

        failed = run_jobs(context, tuple(args.only), update_bundle, args.job_seconds)
        update_bundle()
        if failed:
            print(f"failed: {', '.join(failed)}")
            # 2: another process may have more luck.
            return 1 if context.device_works() else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
