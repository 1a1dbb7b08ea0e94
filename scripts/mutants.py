"""Change one thing in the code, run the tests that should notice, and list the changes that none of them did.

    scripts/mutants [layout] [store] [saving] [loading] [--sample 40] [--seed 0]
    scripts/mutants --survivors

A sample of mutants is drawn for each package, with the operators of Cosmic Ray: another number, comparison or operator,
a negated condition, a loop that is never entered. All positions are equally likely. Each mutant is made in a copy of
the repository, and the tests named in `TESTS` run there until the first one fails. A mutant that makes them hang counts
as killed. Results are appended to build/mutants.jsonl; `--survivors` tries those again that survived the last time.

Not mutated: annotations, decorators, error messages, log messages, `strict=` of zip(), and code for type checkers.
Mutants that change nothing observable are listed, with the reason, in scripts/mutants_equivalent.json; they are not
counted. The exit code is 1 if fewer than 90 % were killed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "mutants.jsonl"
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.json")
AIM = 0.9
LONGEST_LINE = 120

# The tests that should notice, by package: quick ones, that look at its promises.
TESTS = {
    "layout": ["layout", "layout_exhaustive", "grids", "blocks"],
    "store": [
        "readers",
        "durability",
        "small_files",
        "retention",
        "crash",
        "lease_claims",
        "lease",
        "newer_format",
        "moved_checkpoints",
    ],
    "saving": ["replicas", "faults", "outcomes", "snapshots", "peft", "merging"],
    "loading": ["topology", "changes", "by_name", "state", "foreign", "growing_modules", "containers"],
}
# `is` and `==` are the same for None and enums, where the code uses `is`.
SKIPPED = ("RemoveDecorator", "ReplaceComparisonOperator_Is_Eq", "ReplaceComparisonOperator_IsNot_NotEq")


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: The file, relative to the repository.
        operator: The operator's name.
        occurrence: Which of the operator's positions in the file.
        line: The line's number, from 1.
        before: The line, without indentation.
        after: The same line, changed.
    """

    file: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Identifies it also after lines have moved."""
        return self.file, self.before, self.after

    def __str__(self) -> str:
        return f"{self.file}:{self.line}\n    - {self.before}\n    + {self.after}"


def spared(tree: ast.Module) -> set[tuple[int, int]]:
    """The positions (line and column) of code that is not mutated."""
    found = set()
    for root in _spared_nodes(tree):
        for node in ast.walk(root):
            if isinstance(node, ast.expr | ast.stmt | ast.keyword):
                found |= set(_positions(node))
    return found


def _spared_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef():
                yield from node.decorator_list
                yield from [node.returns] if node.returns is not None else []
            case ast.ClassDef():
                yield from node.decorator_list
            case (
                ast.arg(annotation=ast.expr() as found)
                | ast.AnnAssign(annotation=found)
                | ast.Raise(exc=ast.expr() as found)
            ):
                yield found
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Call(func=ast.Attribute(value=ast.Name(id="log"))):
                yield node
            case ast.keyword(arg="strict"):  # of zip(): a check of our own code
                yield node


def _positions(node: ast.expr | ast.stmt | ast.keyword) -> Iterator[tuple[int, int]]:
    last = node.end_lineno or node.lineno
    for line in range(node.lineno, last + 1):
        begin = node.col_offset if line == node.lineno else 0
        end = node.end_col_offset if line == last and node.end_col_offset is not None else LONGEST_LINE
        yield from ((line, column) for column in range(begin, end))


def mutants_of(path: Path) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """The operators, each with its occurrence, that apply at each position of a file."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast_from_path

    excluded = spared(ast.parse(path.read_text()))
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}
    tree = get_ast_from_path(path)
    for name in sorted(plugins.operator_names()):
        operator = plugins.get_operator(name)
        if operator.arguments() or any(part in name for part in SKIPPED):
            continue
        positions = (start for node in ast_nodes(tree) for start, _ in operator().mutation_positions(node))
        for occurrence, position in enumerate(positions):
            if position not in excluded:
                found.setdefault(position, []).append((name, occurrence))
    return found


def mutated(path: Path, operator: str, occurrence: int) -> str:
    """A file's text after one change."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    return str(mutate_code(path.read_text(), plugins.get_operator(operator)(), occurrence))


def drawn(package: str, count: int, seed: int) -> list[Mutant]:
    """A sample of a package's mutants, without those that are known to be equivalent."""
    random_ = random.Random(f"{package} {seed}")  # noqa: S311 - a sample
    known = equivalent()
    places = [
        (path, position, choices)
        for path in sorted((ROOT / "hydra_ckpt" / package).glob("*.py"))
        for position, choices in sorted(mutants_of(path).items())
    ]
    random_.shuffle(places)
    found: list[Mutant] = []
    for path, _, choices in places:
        if len(found) == count:
            break
        mutant = described(path, *random_.choice(choices))
        if mutant is not None and mutant.key not in known:
            found.append(mutant)
    return found


def equivalent() -> set[tuple[str, ...]]:
    """The keys of mutants that change nothing observable."""
    return {tuple(row[:3]) for row in json.loads(EQUIVALENT.read_text())}


def described(path: Path, operator: str, occurrence: int) -> Mutant | None:
    """A mutant with its line before and after; None if its text is not Python."""
    text = mutated(path, operator, occurrence)
    try:
        ast.parse(text)
    except SyntaxError:
        return None
    old, new = path.read_text().splitlines(), text.splitlines()
    for number, (before, after) in enumerate(zip(old, new, strict=False), 1):
        if before != after:
            file = path.relative_to(ROOT).as_posix()
            return Mutant(file, operator, occurrence, number, before.strip(), after.strip())
    return None


class Trial:
    """A copy of the repository in which mutants are tried. A context manager."""

    def __enter__(self) -> Trial:
        self._directory = tempfile.TemporaryDirectory(prefix="mutants-")
        self.root = Path(self._directory.name) / "repository"
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "outputs", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, self.root, ignore=ignored)
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()

    def passes(self, package: str, module: str, limit_s: float) -> bool:
        """Whether the package's tests pass within the limit, those first that mention the module most often."""
        files = [self.root / "tests" / f"test_{name}.py" for name in TESTS[package]]
        files = [file for file in files if file.exists()]
        files.sort(key=lambda file: -file.read_text().count(f"{package}.{module}"))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *files]
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                return process.wait(limit_s) == 0
            except subprocess.TimeoutExpired:
                return False
            finally:
                _end_group(process.pid)

    def survives(self, mutant: Mutant, limit_s: float) -> bool:
        """Whether no test notices a mutant."""
        path = self.root / mutant.file
        original = path.read_text()
        path.write_text(mutated(path, mutant.operator, mutant.occurrence))
        try:
            return self.passes(path.parent.name, path.stem, limit_s)
        finally:
            path.write_text(original)


def _end_group(group: int) -> None:
    """End what a test run may have left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def last_survivors() -> list[Mutant]:
    """The mutants whose last trial they survived."""
    results = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        survived = row.pop("survived")
        mutant = Mutant(**row)
        results[mutant.key] = mutant if survived and mutant.key not in equivalent() else None
    return [found for mutant in results.values() if mutant is not None for found in _found_again(mutant)]


def _found_again(mutant: Mutant) -> Iterator[Mutant]:
    """The same mutant in today's file."""
    path = ROOT / mutant.file
    for choices in mutants_of(path).values():
        for choice in choices:
            found = described(path, *choice) if choice[0] == mutant.operator else None
            if found is not None and found.key == mutant.key:
                yield found
                return


def tried(mutants: list[Mutant]) -> list[Mutant]:
    """Try mutants one after the other; those that survive."""
    RESULTS.parent.mkdir(exist_ok=True)
    survivors, limits = [], dict[str, float]()
    with Trial() as trial, RESULTS.open("a") as results:
        for number, mutant in enumerate(mutants, 1):
            package = Path(mutant.file).parent.name
            begun = time.monotonic()
            if package not in limits:
                if not trial.passes(package, "", 3600):
                    sys.exit(f"the tests of {package} fail without any change: {' '.join(TESTS[package])}")
                limits[package] = 60 + 4 * (time.monotonic() - begun)
                print(f"{package}: the tests take {time.monotonic() - begun:.0f} s", flush=True)
                begun = time.monotonic()
            survived = trial.survives(mutant, limits[package])
            survivors += [mutant] if survived else []
            verdict = "SURVIVED" if survived else "killed"
            print(f"{number}/{len(mutants)} {verdict} in {time.monotonic() - begun:.0f} s: {mutant}", flush=True)
            results.write(json.dumps({**asdict(mutant), "survived": survived}) + "\n")
            results.flush()
    return survivors


def main() -> None:
    """Draw, try, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", choices=[*TESTS, []], metavar="package", help="; ".join(TESTS))
    parser.add_argument("--sample", type=int, default=40, help="mutants in all; 40 take about half an hour")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", action="store_true", help="try those again that survived the last time")
    options = parser.parse_args()
    sys.path.append(str(ROOT / ".venv/apart/cosmic-ray"))
    import parso  # noqa: F401  # cosmic_ray imports a part of it, which fails if it is the first

    packages = options.packages or list(TESTS)
    share = -(-options.sample // len(packages))
    mutants = (
        last_survivors() if options.survivors else [m for name in packages for m in drawn(name, share, options.seed)]
    )
    survivors = tried(mutants)
    killed = 1 - len(survivors) / max(len(mutants), 1)
    print(f"\n{killed:.0%} of {len(mutants)} mutants killed (aim: {AIM:.0%})")
    for mutant in survivors:
        print(f"survived: {mutant}")
    sys.exit(killed < AIM)


if __name__ == "__main__":
    main()
