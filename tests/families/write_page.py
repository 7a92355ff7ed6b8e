"""Check every family and write docs/coverage.md: `make coverage`."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from all_families import FAMILIES, NOT_BUILT, missing_package
from check_family import CONFIG, Coverage, check_family
from family import Family

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"

INTRODUCTION = """\
# Which models are converted

Written by `make coverage`, with {versions}.

Every model is built from its library's own class with small random weights and compiled whole: pictures and videos have
32 tokens or more, text at most 16, and what has fewer than {min_seq_len} counts as short. Behind our passes stands
AOTAutograd without Inductor's code generation, whose own errors are not counted. Of each is checked, with the
expectations in `tests/families/`:

- every attention site that the rules call eligible is converted and named as `named_modules` names it, and what is read
  of its tokens is as expected;
- at sparsity 0 the outputs equal the eager model's, and so do the gradients of all parameters (relative L2 error in
  float32: at most {output_error:.0e} of an output, {gradient_error:.0e} of a parameter's gradient);
- the sites that stay dense are the nodes that Dynamo traced, with the same arguments, and a graph in which nothing is
  converted stays as it is;
- no softmax over three dimensions or more is overlooked, and no attention runs outside of the compiled graphs, except
  where the last column says so.

**{num_families} models, {num_diffusers} of them of diffusers; {num_converted} of their {num_sites} attention sites
become SLA2.** The rest is short, mostly cross-attention to text, or has a mask or bias that the operation cannot take.

Tokens: numbers are text or other tokens that stay exact, before or after the grid of the video or picture (frames x
height x width); `?` is a grid that the graph does not show, `-` means that queries and keys are not the same tokens.
"""

HEADER = "| model | sites | converted | tokens | left dense, and why |\n| --- | --- | --- | --- | --- |\n"


def main() -> int:
    """Check all families and write the page; 1 where one of them fails."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    checked: list[tuple[Family, Coverage]] = []
    failed: list[str] = []
    for family in FAMILIES:
        if missing_package(family.library) is not None:
            continue
        try:
            checked.append((family, check_family(family)))
            print(f"{family.name}: as expected", flush=True)
        except Exception:
            failed.append(family.name)
            print(f"{family.name}: {traceback.format_exc(limit=-3)}", flush=True)
    if failed:
        print(f"The page was not written, as {len(failed)} failed: {', '.join(failed)}")
        return 1
    PAGE.write_text(page(checked))
    return 0


def page(checked: list[tuple[Family, Coverage]]) -> str:
    """The page as Markdown."""
    libraries = dict.fromkeys(family.library for family, _ in checked)
    coverages = [coverage for _, coverage in checked]
    text = INTRODUCTION.format(
        versions=", ".join(
            [
                "torch " + torch.__version__.partition("+")[0],
                *(_versioned(name) for name in libraries if name != "torch"),
            ]
        ),
        min_seq_len=CONFIG.min_seq_len,
        output_error=max(coverage.output_error for coverage in coverages),
        gradient_error=max(coverage.gradient_error for coverage in coverages),
        num_families=len(checked),
        num_diffusers=sum(family.library == "diffusers" for family, _ in checked),
        num_converted=sum(coverage.num_converted for coverage in coverages),
        num_sites=sum(len(coverage.sites) for coverage in coverages),
    )
    for library in libraries:
        text += f"\n## {library}\n\n{HEADER}"
        text += "".join(_row(family, coverage) for family, coverage in checked if family.library == library)
    return text + _not_checked()


def _versioned(library: str) -> str:
    return f"{library} {version(library.replace('_', '-'))}"


def _row(family: Family, coverage: Coverage) -> str:
    short = f", fewer than min_seq_len={CONFIG.min_seq_len}"
    left = [f"{count}: {reason.removesuffix(short)}" for reason, count in coverage.reasons.items()]
    if coverage.outside:
        left.append(f"{coverage.outside} in functions that Dynamo leaves to Python")
    if coverage.num_graphs > 1:
        left.append(f"{coverage.num_graphs} graphs")
    if family.no_training is not None:
        left.append(f"inference only: {family.no_training}")
    tokens = ", ".join(f"`{text}`" for text in family.tokens)
    return f"| {family.name} | {len(coverage.sites)} | {coverage.num_converted} | {tokens} | {'; '.join(left)} |\n"


def _not_checked() -> str:
    missing = Counter(family.library for family in FAMILIES if missing_package(family.library) is not None)
    text = "\n## Not checked\n\n"
    for library, count in missing.items():
        text += f"- {count} models of {library}: {str(missing_package(library)).splitlines()[0]}\n"
    return text + "".join(f"- {name}: {reason}\n" for name, reason in NOT_BUILT.items())


if __name__ == "__main__":
    sys.exit(main())
