"""scripts/mutants.py draws what it says, and its list of equivalent mutants is about today's code."""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
script = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "mutants.py")))

CODE = """
@decorate(1)
def f(a: int | 2 = 3) -> 4:
    if TYPE_CHECKING:
        x = 5
    log.info("%d", 6)
    for a, b in zip(c, d, strict=True):
        y: 7 = 8
    raise ValueError(
        9,
        10,
    )
"""


def test_what_tests_cannot_or_need_not_notice_is_spared() -> None:
    tree = ast.parse(CODE)
    spared = script.spared(tree)
    numbers = {
        node.value: (node.lineno, node.col_offset) in spared
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and type(node.value) in (int, bool)
    }
    assert numbers == {3: False, 8: False, 2: True, 4: True, 5: True, 6: True, 7: True, 9: True, 10: True, True: True}


def test_the_tests_that_should_notice_exist() -> None:
    for package, tests in script.TESTS.items():
        assert (ROOT / "hydra_ckpt" / package).is_dir()
        for name in tests:
            assert (ROOT / "tests" / f"test_{name}.py").is_file(), name


def test_equivalent_mutants_have_a_reason_and_their_line_exists() -> None:
    for file, before, after, reason in json.loads(script.EQUIVALENT.read_text()):
        lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
        assert before in lines, f"{file}: {before}"
        assert before != after
        assert len(reason) > 20
