"""Mutation testing: small faults are put into torch2pc one at a time, and the tests should notice.

    python -m tests.mutants --count 300 --seed 0

draws that many mutants and runs the tests that execute the changed line, the quickest first, in a
forked process that finds the changed module when it imports torch2pc, as do the Python processes
that it starts. A mutant is killed if a test fails, the process dies, or it takes far longer than it
should. Those that survive are printed. What is known stays in ``build/mutants``, so that a run can be
stopped and started again. Mutants that nothing can tell from the original, or only its speed or
memory, are listed with the reason in ``equivalent_mutants.txt``; they do not count. What is changed,
and how, is in ``mutations.py``.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import marshal
import os
import resource
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
from hypothesis import Phase, settings
from tqdm import tqdm

from tests.mutations import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[1]
# These use the library, and take long; what they are about is other code.
OTHER_TESTS = ("test_paper_figures", "test_figure", "test_letters", "test_benchmarks")
OTHER_TESTS += ("test_architectures", "test_tools", "test_mutants")
# Its tests share the processes that one of them starts, so that each executes what they do.
OF_PROCESSES = "tests/test_distributed.py"
OF_PROCESSES_SECONDS = 600.0
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
GIBIBYTE = 2**30
KILLED = {"killed": True}


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    os.chdir(ROOT)
    preload()
    asked.out.mkdir(parents=True, exist_ok=True)
    tests = Tests(asked.out)
    tests.measure()
    known, equivalent = Known(asked.out / "results.json"), read_equivalent()
    if asked.again:
        sample = [m for m in all_mutants() if not known.results.get(m.key, KILLED)["killed"]]
    else:
        sample = [m for m in draw(asked.count, asked.seed) if m.key not in known.results]
    for mutant in tqdm(sample, unit="mutant", smoothing=0.05):
        if mutant.key not in equivalent:
            known.add(mutant, tests.run(mutant, asked.seconds))
    report(known, equivalent)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="Finds faults that the tests would not notice."
    )
    parser.add_argument("--count", type=int, default=300, metavar="N", help="default: 300")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (0)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="run so many seconds of tests on a mutant at most (default: 30)",
    )
    parser.add_argument(
        "--again", action="store_true", help="instead of a sample, try those that survived again"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "mutants", help="default: build/mutants"
    )
    return parser.parse_args(arguments)


def preload() -> None:
    """Import once what every process needs, but not torch2pc, and start no threads, for forks' sake."""
    os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
    # What is kept on the disk does not know of the change.
    for kept in ("TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_AUTOGRAD_CACHE"):
        os.environ[kept] = "0"
    os.environ["TORCH_DYNAMO_AUTOMATIC_DYNAMIC_LOCAL_PGO"] = "0"
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    assert "torch2pc" not in sys.modules


def sources() -> list[Path]:
    """The files that mutants are made of."""
    return [p for p in sorted((ROOT / "torch2pc").rglob("*.py")) if p.name != "__init__.py"]


@functools.cache
def all_mutants() -> list[Mutant]:
    return [mutant for path in sources() for mutant in mutants_of(path, ROOT)]


def draw(count: int, seed: int) -> list[Mutant]:
    """A random sample, most of which stays the same when the code is changed."""

    def place(mutant: Mutant) -> str:
        return hashlib.sha256(f"{seed} {mutant.key}".encode()).hexdigest()

    return sorted(all_mutants(), key=place)[:count]


def read_equivalent() -> dict[str, str]:
    """The reason for each mutant, by its key: blocks of three lines, the last of which says why."""
    blocks = [block.splitlines() for block in EQUIVALENT.read_text().split("\n\n") if block]
    return {"\n".join([where, change.strip()]): why.strip() for where, change, why in blocks}


class Known:
    """What earlier runs and this one found out, in a file that is complete at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, dict[str, Any]] = read_json(path)

    def add(self, mutant: Mutant, result: dict[str, Any]) -> None:
        self.results[mutant.key] = result
        write_json(self.path, self.results)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, value: object) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=1))
    unfinished.replace(path)


class Tests:
    """The tests of the project: which lines each of them executes, and how long it takes."""

    def __init__(self, folder: Path) -> None:
        self.path, self.seen = folder / "tests.json", folder / "seen.json"
        # By the file that holds the tests: a digest, and for each test seconds and {source: lines}.
        # A line is known by its text, so that the lines around it may change.
        self.files: dict[str, dict[str, Any]] = read_json(self.path)
        self.kills: Counter[str] = Counter()

    def measure(self) -> None:
        """Run what has changed since it was last measured, and note the lines that it executes."""
        files = sorted((ROOT / "tests").glob("*.py"))
        helpers = [p for p in files if not p.name.startswith(("test_", "muta"))]
        of_all = digest(helpers)
        now = {
            str(p.relative_to(ROOT)): of_all + digest([p])
            for p in files
            if p.name.startswith("test_") and not p.name.startswith(OTHER_TESTS)
        }
        now["torch2pc"] = digest((ROOT / "torch2pc").rglob("*.py"))  # the examples in docstrings
        old = [name for name in now if self.files.get(name, {}).get("digest") != now[name]]
        self.files = {name: found for name, found in self.files.items() if name in now}
        for name in tqdm(old, "measuring the tests", unit="file"):
            status = forked(lambda name=name: self._trace(name), 1800.0)  # type: ignore[misc]
            if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                raise SystemExit(f"{name} fails without any mutant: {status}")
            self.files[name] = {"digest": now[name], "tests": read_json(self.seen)}
            write_json(self.path, self.files)

    def _trace(self, name: str) -> int:
        watch = coverage_of(None)
        watch.start()
        plugin = Plugin(switch_context=watch.switch_context)
        processes = Processes(self.path.parent)
        if name == OF_PROCESSES:
            processes.take_part(None)
        status = run_pytest([name], plugin)
        watch.stop()
        tests: dict[str, Any] = {
            test: {"seconds": seconds, "lines": {}} for test, seconds in plugin.seconds.items()
        }
        data = watch.get_data()
        for file in map(Path, data.measured_files()):
            texts = lines_of(file)
            for line, contexts in data.contexts_by_lineno(str(file)).items():
                for test in tests.keys() & contexts:
                    lines = tests[test]["lines"].setdefault(str(file.relative_to(ROOT)), [])
                    lines.append(texts[line - 1])
        # (What others left there is not theirs.)
        in_processes = processes.lines() if name == OF_PROCESSES else {}
        for file, executed in in_processes.items():
            texts = lines_of(file)
            for of_test in tests.values():
                lines = of_test["lines"].setdefault(str(file.relative_to(ROOT)), [])
                lines.extend(texts[line - 1] for line in executed)
        write_json(self.seen, tests)
        return status

    def of(self, mutant: Mutant, limit: float) -> dict[str, float]:
        """The tests that execute a mutant's line and their seconds, the quickest first.

        Of what runs at import alone, or is new since the tests were measured, all that execute
        anything in the file. ``limit`` is on the sum of their seconds.
        """
        texts = lines_of(ROOT / mutant.path)
        lines = {texts[line - 1] for line in mutant.lines}
        of_file = {
            test: (known["seconds"], known["lines"][mutant.path])
            for file in self.files.values()
            for test, known in file["tests"].items()
            if mutant.path in known["lines"]
        }
        found = {test: s for test, (s, executed) in of_file.items() if lines & {*executed}}
        found = found or {test: s for test, (s, _) in of_file.items()}
        own = {f"tests/test_{part}.py" for part in Path(mutant.path).with_suffix("").parts}

        # With other arguments a test finds less than another test does.
        turns: Counter[str] = Counter()
        turn = {}
        for test in sorted(found, key=found.__getitem__):
            name = test.partition("[")[0]
            turns[name] += 1
            turn[test] = turns[name]

        def cost(test: str) -> tuple[bool, float]:
            is_own = test.partition("::")[0] in own  # of the file, or of its folder
            expected = found[test] * turn[test] / (1 + self.kills[test]) / (5 if is_own else 1)
            return test.startswith(OF_PROCESSES), expected  # these take longer than it seems

        total, chosen = 0.0, {}
        for test in sorted(found, key=cost):
            total += found[test]
            if total > limit:
                break
            chosen[test] = found[test]
        return chosen

    def run(self, mutant: Mutant, limit: float) -> dict[str, Any]:
        """Whether the tests kill the mutant, and how."""
        start, tests = time.monotonic(), self.of(mutant, limit)
        code = mutant.code()
        self.seen.unlink(missing_ok=True)

        def body() -> int:
            sys.meta_path.insert(0, Finder(mutant.module, code))
            Processes(self.path.parent).take_part((mutant.module, code))
            # The first few tests kill most mutants, and need few files of tests to be imported.
            names = list(tests)
            for part in (names[:8], names[8:60], names[60:]):
                plugin = Plugin(part)
                files = list(dict.fromkeys(name.partition("::")[0] for name in part))
                status = run_pytest(files, plugin) if files else 0
                if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                    write_json(self.seen, plugin.failed)
                    return status
            return 0

        longest = 30.0 + 8.0 * sum(tests.values())
        longest += OF_PROCESSES_SECONDS * any(test.startswith(OF_PROCESSES) for test in tests)
        status = forked(body, longest) if tests else 0
        by = ["time limit"] if status is None else read_json(self.seen) or [f"status {status}"]
        self.kills.update(by)
        return {
            "killed": status != 0,
            "by": by[0] if status != 0 else None,
            "tests": len(tests),
            "seconds": round(time.monotonic() - start, 1),
        }


@functools.cache
def lines_of(path: Path) -> list[int]:
    """A number for the text of each line."""
    return [zlib.crc32(line.strip().encode()) for line in path.read_text().splitlines()]


def digest(paths: Iterable[Path]) -> str:
    texts = [path.read_bytes() for path in sorted(paths)]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


class Plugin:
    """Tells pytest which tests to run, and in which order; notes what they took and which failed."""

    def __init__(
        self, tests: Collection[str] | None = None, switch_context: Callable[[str], None] = print
    ) -> None:
        self.tests, self.switch_context = tests, switch_context
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_sessionstart(self) -> None:
        # To make a failure smaller takes long.
        phases = [Phase.explicit, Phase.generate]
        settings.register_profile("mutants", settings.default, phases=phases, print_blob=False)
        settings.load_profile("mutants")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.tests is not None:
            place = {test: k for k, test in enumerate(self.tests)}
            chosen = [item for item in items if item.nodeid in place]
            items[:] = sorted(chosen, key=lambda item: place[item.nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.switch_context(nodeid)
        self.seconds[nodeid] = -time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] += time.process_time()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def run_pytest(files: Sequence[str], plugin: Plugin) -> int:
    options = [
        "-x",
        "--numprocesses=0",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--no-summary",
        "--tb=no",
        "--assert=plain",
    ]
    return int(pytest.main([*options, *files], plugins=[plugin]))


class Finder(importlib.abc.MetaPathFinder):
    """Finds one module, and gives it other code than its file holds."""

    def __init__(self, name: str, code: CodeType) -> None:
        self.name, self.changed = name, code

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == self.name else None
        if spec is not None and spec.origin is not None:
            spec.loader = Loader(name, spec.origin)
            spec.loader.changed = self.changed
        return spec


class Loader(importlib.machinery.SourceFileLoader):
    changed: CodeType

    def get_code(self, name: str) -> CodeType:
        return self.changed


class Processes:
    """Lets the Python processes that tests start find the changed module, or note what they execute."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve() / "processes"
        self.change, self.data = self.folder / "change", self.folder / "coverage"

    def take_part(self, changed: tuple[str, CodeType] | None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if changed is not None:
            self.change.write_bytes(marshal.dumps(changed))
        # Python imports a module of this name when it starts.
        (self.folder / "sitecustomize.py").write_text(
            "from pathlib import Path\nfrom tests.mutants import Processes\n"
            f"Processes(Path({str(self.folder.parent)!r})).begin()\n"
        )
        earlier = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(self.folder), str(ROOT), earlier])

    def begin(self) -> None:
        """What a started process does first."""
        if self.change.exists():
            sys.meta_path.insert(0, Finder(*marshal.loads(self.change.read_bytes())))
            return
        watch, leave = coverage_of(self.data), os._exit
        watch.start()

        def save() -> None:
            watch.stop()
            watch.save()

        def save_and_leave(status: int) -> None:
            save()
            leave(status)

        atexit.register(save)
        os._exit = save_and_leave  # type: ignore[assignment]

    def lines(self) -> dict[Path, list[int]]:
        """The lines of each file that the processes executed."""
        import coverage

        found: dict[Path, list[int]] = {}
        for path in self.folder.glob("coverage.*"):
            data = coverage.CoverageData(str(path))
            data.read()
            for file in data.measured_files():
                found.setdefault(Path(file), []).extend(data.lines(file) or [])
        return {file: sorted({*lines}) for file, lines in found.items()}


def coverage_of(path: Path | None) -> Any:
    """What notes the lines of torch2pc that are executed; each process in a file of its own."""
    import coverage

    where = None if path is None else str(path)
    inside = [str(ROOT / "torch2pc" / "*")]
    return coverage.Coverage(data_file=where, data_suffix=path is not None, include=inside)


def forked(body: Callable[[], int], seconds: float) -> int | None:
    """The exit status of ``body`` in a forked process; None if it took too long and was stopped."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        status = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_DATA, (8 * GIBIBYTE, 8 * GIBIBYTE))
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            status = body()
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def report(known: Known, equivalent: dict[str, str]) -> None:
    """Print the mutants that survived, and the score; also what is listed, but is there no more."""
    for key in sorted(equivalent.keys() - {mutant.key for mutant in all_mutants()}):
        print(f"\nin {EQUIVALENT.name}, but not in the code:\n{key}")
    tried = [m for m in all_mutants() if m.key in known.results and m.key not in equivalent]
    survived = [m for m in tried if not known.results[m.key]["killed"]]
    for mutant in survived:
        tests = known.results[mutant.key]["tests"]
        print(f"\n{mutant.path}:{mutant.line} {mutant.function} ({tests} tests)")
        print(f"- {mutant.before}\n+ {mutant.after}")
    killed = len(tried) - len(survived)
    print(
        f"\nOf {len(tried)} mutants that were tried so far, {killed} were killed "
        f"({killed / max(1, len(tried)):.1%})."
    )


if __name__ == "__main__":
    sys.exit(main())
