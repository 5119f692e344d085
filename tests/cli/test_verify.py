"""The command `verify`: its table, its exit statuses, and the reproduction it prints of what fails."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import unicodedata

import pytest
import torch

import tensorattn as ta
from tensorattn.__main__ import main
from tensorattn.cli import verify as command
from tensorattn.functional import OPERATORS, Claim
from tensorattn.testing import check_convex
from tensorattn.testing.check import Asked, holds
from tensorattn.testing.theorems import THEOREMS, counted_once

PROGRAM = "python -m tensorattn verify"
VERDICT = re.compile(r"(\S+) +(holds|FAILS|unclear|not tried)$")
HEADINGS = "statement formula tried for, worst cases allowed used verdict"


def verify(*words: str) -> int:
    return main(["verify", *words])


def check_table(printed: str) -> dict[str, int]:
    """The table is aligned and narrow; the number of rows of each verdict."""
    shown = "".join(letter for letter in printed if not unicodedata.combining(letter))
    lines = shown.split("\nallowed: ")[0].splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split() == HEADINGS.split()
    gaps = [match.start() for match in re.finditer(" -", lines[1])]
    assert all(len(line) <= gap or line[gap] == " " for line in lines for gap in gaps)
    found = [match.groups() for match in map(VERDICT.search, lines) if match]
    assert all(
        used.endswith("%") and float(used[:-1].lstrip("<")) <= 100
        for used, mark in found
        if mark in ("holds", "unclear")
    )
    return {mark: sum(mark == other for _, other in found) for mark in ("holds", "FAILS", "unclear", "not tried")}


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_statement_has_a_row_and_the_exit_status_tells_whether_any_fails(capsys, dtype):
    status = verify("--examples", "2", "--dtype", dtype)
    printed = capsys.readouterr().out
    marks = check_table(printed)
    assert status == (1 if marks["FAILS"] else 0)
    trials = command.trials(Asked(dtype=getattr(torch, dtype), examples=2))
    assert sum(marks.values()) == len({law.words for law, *_ in trials})
    # What was tried in another type is not said to hold in this one.
    here = {law.words for law, _, asked in trials if asked.dtype is getattr(torch, dtype) and not law.double}
    here |= {law.words for law, *_ in trials if law.double} if dtype == "float64" else set()
    counted = re.search(rf"^(\d+) of (\d+) statements tried in {dtype} on cpu hold, in \d+ cases", printed, re.M)
    others = re.findall(r"^(\d+) of (\d+) statements tried in ([\w, ]+) instead hold", printed, re.M)
    elsewhere = sum(int(number) for _, number, _ in others)
    assert (int(counted[2]), elsewhere) == (len(here), sum(marks.values()) - len(here))
    assert int(counted[1]) + sum(int(number) for number, *_ in others) == marks["holds"]
    assert others and all(dtype not in told.split(", ") for *_, told in others)
    # Two examples may be of zeros alone; apart from that float64 is fine enough, half precision often is not.
    assert marks["not tried"] == 0 and (marks["unclear"] > 0 or dtype != "bfloat16")
    assert marks["unclear"] < 5 or dtype != "float64"
    assert ("\nunclear: no error" in printed) == (marks["unclear"] > 0)
    assert ("means that no error above" in printed) == (dtype == "bfloat16")
    assert printed.count("\n# FAILS: ") == marks["FAILS"]
    cap, epsilon = {"float64": ("10000", "2.2e-16"), "float32": ("100", "1.2e-07"), "bfloat16": ("2", "1.2e-07")}[dtype]
    assert f"{dtype}: logits of at most {cap}; outputs within" in printed and epsilon in printed
    assert ("multiples of 1/8" in printed) == (dtype == "bfloat16")
    assert ("(float64)" in printed) and marks["holds"] > 20


def test_an_operator_alone_passes_in_the_order_that_is_asked_for(capsys, registry):
    orders = set()
    real = OPERATORS["kao_kv"]

    def spy(query, key, value, *, order, **others):
        orders.add(order)
        return ta.kao_kv(query, key, value, order=order, **others)

    registry["kao_kv"] = dataclasses.replace(real, function=spy)
    words = ("--examples", "2", "--operator", "kao_kv", "--order", "3", "--dtype", "float32", "--seed", "3")
    assert verify(*words) == 0
    printed = capsys.readouterr().out
    marks = check_table(printed)
    assert marks["holds"] > 5 and marks["FAILS"] == 0
    assert "float32: logits of at most 100; outputs within 32 * 1.2e-07 (1 + L) max|V|" in printed
    assert re.search(r"^1 of 1 statements tried in float64 instead hold, in 1 cases\.$", printed, re.M)
    assert orders == {3}


# ---- what fails ----------------------------------------------------------------------------------------------


def wrong(query, key, value, *, order, **others):
    """Attention that forgets the grand mean's share: right with a single mode."""
    result = ta.additive_attention(query, key, value, order=order, **others)
    if isinstance(result, torch.Tensor):
        return result + (order - 1) * 1e-3
    return result._replace(output=result.output + (order - 1) * 1e-3)


def test_a_wrong_operator_fails_with_a_reproduction_that_shows_it(capsys, registry):
    few = frozenset({Claim.EXACT_ON_ADDITIVE, Claim.ZERO_SCALE_MEAN, Claim.KEY_SHIFT})
    mine = dataclasses.replace(OPERATORS["additive"], name="mine", function=wrong, options={}, claims=lambda: few)
    ta.register_operator(mine)
    assert verify("--examples", "5", "--operator", "mine") == 1
    printed = capsys.readouterr().out
    marks = check_table(printed)
    assert marks["FAILS"] >= 2 and marks["holds"] >= 5
    assert "mine" in printed.split("fail:\n")[1]
    pieces = re.split(r"\n\n(?=# FAILS: )", printed)[1:]
    assert len(pieces) == marks["FAILS"]
    for piece in pieces:
        told = re.search(r"# mine: (.+?), but there is", piece).group(1)
        with pytest.raises(AssertionError, match=re.escape(f"mine: {told}, but there is")):
            exec(piece, {})
    registry["mine"] = dataclasses.replace(mine, function=ta.additive_attention)
    for piece in pieces:
        exec(piece, {})  # the case is what is wrong for the wrong operator only


def test_an_operator_that_raises_fails(registry):
    def raising(query, key, value, *, order, **others):
        if key.shape[-1] > 1:
            raise RuntimeError("no channels, please")
        return ta.kao_kv(query, key, value, order=order, **others)

    registry["kao_kv"] = dataclasses.replace(OPERATORS["kao_kv"], function=raising)
    work = [trial for trial in command.trials(Asked(examples=10), "kao_kv") if trial[0] is check_convex]
    verdicts = command.carry_out(work)
    assert verdicts[0].mark == "FAILS"
    assert "# RuntimeError: no channels, please" in command.report(verdicts, torch.float64, "cpu")


def test_a_statement_with_nothing_to_compare_is_not_said_to_hold():
    def idle(subject, case, draw):
        yield from ()

    law = dataclasses.replace(counted_once, compare=idle)
    printed = command.report(command.carry_out([(law, None, Asked(examples=3))]), torch.float64, "cpu")
    assert check_table(printed) == {"holds": 0, "FAILS": 0, "unclear": 0, "not tried": 1}
    assert "0 of 1 statements tried in float64 on cpu hold, in 0 cases; for 1 there was nothing to compare" in printed


def test_a_tolerance_as_large_as_what_is_compared_is_unclear():
    verdict = command.Verdict(THEOREMS[0], cases=3, shares=[0.1, 0.2, 5.0])
    assert verdict.mark == "holds"
    verdict.shares.append(6.0)
    assert verdict.mark == "unclear"
    assert "unclear: no error above what is allowed was found, but more than 30% is allowed" in command.report(
        [verdict], torch.float64, "cpu"
    )
    verdict.shares.clear()
    assert verdict.mark == "holds"  # of yes or no there is no size


def test_numbers_are_short_and_only_the_first_failure_is_told():
    def some(subject, case, draw):
        yield holds("it must be right", subject is not ta)

    law = dataclasses.replace(check_convex, compare=some)
    verdict = command.Verdict(law, cases=1)
    for worst, text in (
        (0.0, "0%"),
        (0.0361, "3.6%"),
        (1e-5, "<0.01%"),
        (13.4, "13.4×"),
        (1234.0, "1e+03×"),
        (float("inf"), "inf×"),
    ):
        verdict.worst = worst
        assert text in command.report([verdict], torch.float64, "cpu").splitlines()[2].split()
    work = [trial for trial in command.trials(Asked(examples=1), "axial") if trial[0] is check_convex]
    assert work and all(variant.name == "axial" for _, variant, _ in work)


# ---- bad input, and what is not installed ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--dtype", "int8"), "--dtype must be one of float64, float32, bfloat16, float16, got 'int8'."),
        (("--order", "0"), "--order must be between 1 and 6, got 0."),
        (("--order", "7"), "--order must be between 1 and 6, got 7."),
        (("--examples", "0"), "--examples must be at least 1, got 0."),
        (("--seed", "-1"), "--seed must be at least 0, got -1."),
        (("--operator", "dense"), "there is no operator 'dense'; the operators are: " + ", ".join(OPERATORS) + "."),
    ],
)
def test_bad_arguments_are_told_in_one_line(capsys, words, line):
    assert verify(*words) == 2
    printed = capsys.readouterr()
    assert printed.err == f"{PROGRAM}: {line}\n" and printed.out == ""


@pytest.mark.parametrize("device", ["nowhere", "hpu", "meta"])
def test_a_device_that_is_not_there_is_told_in_one_line(capsys, device):
    assert verify("--device", device) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"{PROGRAM}: --device {device!r} cannot be used: ") and printed.count("\n") == 1


def test_an_order_must_be_a_number(capsys):
    with pytest.raises(SystemExit) as ended:
        verify("--order", "two")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"{PROGRAM}: argument --order: must be a whole number, got 'two'")


def test_without_hypothesis_one_line_names_the_extra():
    code = (
        "import sys\nsys.modules['hypothesis'] = None\nfrom tensorattn.__main__ import main\nsys.exit(main(['verify']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"{PROGRAM}: the command verify needs hypothesis") and ran.stderr.count("\n") == 1
    assert "pip install 'tensorattn[verify]'" in ran.stderr
