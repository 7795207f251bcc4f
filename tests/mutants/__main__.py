"""python -m tests.mutants --file data/plan.py --sample 20"""

import difflib
import tempfile
import time
from pathlib import Path

from command import UserError, run_command
from tests.mutants.mutations import sample_of
from tests.mutants.trial import Trial, copy_tree, stages_of

ROOT = Path(__file__).parents[2]


def run(file: str, sample: int = 20, seed: int = 0, tests: str = "") -> None:
    """Makes small mistakes in a file, one at a time in a copy of the code, and prints those that no test detects.

    Args:
        file: a file, such as data/plan.py, or a folder with several
        sample: number of mistakes, each at a different place, drawn at random
        seed: seed of the draw
        tests: test files, separated by spaces (default: the tests of the file's top-level folder, the file's own first)
    """
    path = (ROOT / file).resolve()
    if not path.is_relative_to(ROOT) or not path.exists():
        raise UserError(f"file={file}: there is no such file in {ROOT}")
    for each in tests.split():
        if not (ROOT / each).is_file():
            raise UserError(f"tests={each}: there is no such file in {ROOT}")
    stages = [[ROOT / each for each in tests.split()]] if tests else stages_of(path, ROOT)
    if not stages:
        raise UserError(f"file={file}: there are no tests in {ROOT / 'tests' / path.relative_to(ROOT).parts[0]}")
    mutants, places = sample_of(path, sample, seed)
    if not mutants:
        raise UserError(f"file={file}: there is nothing in it to change")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trial = Trial(copy_tree(ROOT, Path(folder)), [[each.relative_to(ROOT) for each in stage] for stage in stages])
        caught = hangs = 0
        for number, mutant in enumerate(mutants, 1):
            began = time.monotonic()
            name = mutant.file.relative_to(ROOT)
            end = trial.end_of(name, mutant.code)
            caught += end.caught
            hangs += end.hung
            outcome = f"caught {end.by}" if end.caught else "SURVIVED"
            print(
                f"{number}/{len(mutants)} {name}:{mutant.line} {outcome}; {time.monotonic() - began:.0f} s",
                flush=True,
            )
            if not end.caught:
                old, new = (code.splitlines(keepends=True) for code in (mutant.before, mutant.code))
                print("".join(difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")), flush=True)
    hung = f" ({hangs} by taking too long)" if hangs else ""
    print(
        f"{file}: {len(mutants)} sampled of {places} places (seed {seed}), {caught} caught{hung}, "
        f"{len(mutants) - caught} survived",
        flush=True,
    )


if __name__ == "__main__":
    run_command(run, prog="python -m tests.mutants")
