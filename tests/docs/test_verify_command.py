"""The command `verify`: its table, its exit statuses, and the reproduction it prints of what fails."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import unicodedata

import hypothesis.strategies as st
import pytest
import torch

import tensorattn as ta
from tensorattn import progress
from tensorattn.__main__ import main
from tensorattn.attend.optional import MissingPackageError, require
from tensorattn.operators import OPERATORS, Claim
from tensorattn.testing import CLAIMED, UNIVERSAL, Case, check_convex, check_zero_scale_mean
from tensorattn.testing.reproduction import literal
from tensorattn.testing.variants import variants
from tensorattn.verify import claims, report, work
from tensorattn.verify.searching import search
from tensorattn.verify.statement import THEOREM, Asked

PROGRAM = "python -m tensorattn verify"
VERDICT = re.compile(r"(\S+) +(holds|FAILS|coarse|not tried)$")


def verify(*words: str) -> int:
    return main(["verify", *words])


def check_table(printed: str) -> dict[str, int]:
    """The table is aligned and narrow; the number of rows of each verdict."""
    shown = "".join(letter for letter in printed if not unicodedata.combining(letter))
    lines = shown.split("\nallowed: ")[0].splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split() == [
        "statement",
        "formula",
        "tried",
        "for,",
        "worst",
        "cases",
        "allowed",
        "error",
        "verdict",
    ]
    gaps = [match.start() for match in re.finditer(" -", lines[1])]
    assert all(len(line) <= gap or line[gap] == " " for line in lines for gap in gaps)
    found = [match.groups() for match in map(VERDICT.search, lines) if match]
    assert all(float(error) <= 1 for error, mark in found if mark in ("holds", "coarse"))
    return {mark: sum(mark == other for _, other in found) for mark in ("holds", "FAILS", "coarse", "not tried")}


@pytest.fixture
def registry():
    before = dict(OPERATORS)
    yield OPERATORS
    OPERATORS.clear()
    OPERATORS.update(before)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_statement_has_a_row_and_the_exit_status_tells_whether_any_fails(capsys, dtype):
    status = verify("--examples", "2", "--dtype", dtype)
    printed = capsys.readouterr().out
    marks = check_table(printed)
    assert status == (1 if marks["FAILS"] else 0)
    trials = work.trials(Asked(dtype=getattr(torch, dtype), examples=2))
    assert sum(marks.values()) == len({trial.statement.words for trial in trials})
    # What was tried in another type is not said to hold in this one.
    here = {trial.statement.words for trial in trials if trial.asked.dtype is getattr(torch, dtype)}
    counted = re.search(rf"^(\d+) of (\d+) statements tried in {dtype} on cpu hold, in \d+ cases", printed, re.M)
    others = re.findall(r"^(\d+) of (\d+) statements tried in ([\w, ]+) instead hold", printed, re.M)
    elsewhere = sum(int(number) for _, number, _ in others)
    assert (int(counted[2]), elsewhere) == (len(here), sum(marks.values()) - len(here))
    assert int(counted[1]) + sum(int(number) for number, *_ in others) == marks["holds"]
    assert others and all(dtype not in told.split(", ") for *_, told in others)
    # In float64 every comparison is fine enough; in half precision many are not, and the table says so.
    assert marks["not tried"] == 0 and (marks["coarse"] > 0 or dtype != "bfloat16")
    assert marks["coarse"] == 0 or dtype != "float64"
    assert ("too coarse to tell" in printed) == (marks["coarse"] > 0)
    assert ("means that no error above" in printed) == (dtype == "bfloat16")
    assert printed.count("\n# FAILS: ") == marks["FAILS"]
    cap, epsilon = {"float64": ("10000", "2.2e-16"), "float32": ("100", "1.2e-07"), "bfloat16": ("2", "1.2e-07")}[dtype]
    assert f"{dtype}: logits of at most {cap}; outputs within" in printed and epsilon in printed
    assert ("multiples of 1/8" in printed) == (dtype == "bfloat16")
    assert ("(float64)" in printed) and marks["holds"] > 20


def test_an_operator_alone_passes(capsys):
    assert verify("--examples", "3", "--operator", "kronecker_sum", "--dtype", "float32", "--seed", "3") == 0
    marks = check_table(capsys.readouterr().out)
    assert marks["holds"] > 5 and marks["FAILS"] == 0


def test_an_operator_on_sums_is_tried_with_the_logits_of_sums():
    found = []

    def law(subject, case, draw):
        found.append(case.pooled)
        subject.expect(True, "it must be looked at", case)

    for trial in work.trials(Asked(), "kronecker_sum"):
        if trial.name == "kronecker_sum pool=sum" and not trial.statement.once:
            search(law, trial.subject, trial.statement.strategy(trial.asked, trial.subject), examples=1, seed=0)
    assert found and all(found)


def test_a_given_order_is_the_only_one(registry):
    orders = set()
    real = OPERATORS["kao_kv"]

    def spy(query, key, value, *, order, **others):
        orders.add(order)
        return ta.kao_kv(query, key, value, order=order, **others)

    registry["kao_kv"] = dataclasses.replace(real, function=spy)
    assert verify("--examples", "2", "--operator", "kao_kv", "--order", "3") == 0
    assert orders == {3}


# ---- what fails ----------------------------------------------------------------------------------------------


def wrong(query, key, value, *, order, **others):
    """Attention that forgets the grand mean's share: right with a single mode."""
    result = ta.additive_attention(query, key, value, order=order, **others)
    if isinstance(result, torch.Tensor):
        return result + (order - 1) * 1e-3
    return result._replace(output=result.output + (order - 1) * 1e-3)


def test_a_wrong_operator_fails_with_a_reproduction_that_shows_it(capsys, registry):
    mine = dataclasses.replace(OPERATORS["additive"], name="mine", function=wrong, options={}, claims=claims_of_mine)
    mine = dataclasses.replace(mine, needs=OPERATORS["kao_kv"].needs, attend=None)
    ta.register_operator(mine)
    assert verify("--examples", "10", "--operator", "mine") == 1
    printed = capsys.readouterr().out
    marks = check_table(printed)
    failed = marks["FAILS"]
    assert failed >= 2 and marks["holds"] >= 5
    assert "mine" in printed.split("fail:\n")[1]
    pieces = re.split(r"\n\n(?=# FAILS: )", printed)[1:]
    assert len(pieces) == failed
    for piece in pieces:
        told = re.search(r"# mine: (.+?), but there is", piece).group(1)
        with pytest.raises(AssertionError, match=re.escape(f"mine: {told}, but there is")):
            exec(piece, {})
    registry["mine"] = dataclasses.replace(mine, function=ta.additive_attention)
    for piece in pieces:
        exec(piece, {})  # the case is what is wrong for the wrong operator only


def claims_of_mine():
    return frozenset({Claim.EXACT_ON_ADDITIVE, Claim.ZERO_SCALE_MEAN, Claim.KEY_SHIFT})


def test_an_operator_that_raises_fails(capsys, registry, monkeypatch):
    def raising(query, key, value, *, order, **others):
        if key.shape[-1] > 1:
            raise RuntimeError("no channels, please")
        return ta.kao_kv(query, key, value, order=order, **others)

    registry["kao_kv"] = dataclasses.replace(OPERATORS["kao_kv"], function=raising)
    monkeypatch.setattr(work, "CHECKS", (check_convex,))
    assert verify("--examples", "10", "--operator", "kao_kv") == 1
    assert "# RuntimeError: no channels, please" in capsys.readouterr().out


@pytest.mark.parametrize(
    "theorem", [trial.statement for trial in work.trials(Asked()) if trial.variant is None], ids=lambda s: s.words
)
def test_every_theorem_can_be_reproduced(theorem):
    """What a law draws is written out, and runs again from what is written."""
    asked = Asked(examples=2, seed=1)
    trial = work.Trial(theorem, None, asked)
    seen = []

    def keeping(subject, case, draw):
        drawn = []
        if theorem.once:
            theorem.law(subject, case, draw)
        else:
            theorem.law(subject, case, lambda strategy: drawn.append(draw(strategy)) or drawn[-1])
        seen.append((case, drawn))

    subject = trial.subject
    if theorem.once:
        keeping(subject, theorem.strategy(asked, subject), None)
    else:
        found = search(keeping, subject, theorem.strategy(asked, subject), examples=2, seed=1)
        assert found.failure is None and found.cases == 2
    case, drawn = seen[-1]
    lines = work.reproduction(theorem.law, subject, None, {}, case, drawn)
    exec(lines, {})


def test_a_broken_theorem_is_found_and_made_small():
    def law(subject, case, draw):
        subject.expect(case + draw(st.integers(0, 5)) < 7, "it must be small", case)

    found = search(law, THEOREM, st.integers(0, 100), examples=100, seed=0)
    assert found.cases > 1 and found.failure.case + sum(found.failure.drawn) == 7
    assert search(law, THEOREM, st.integers(0, 1), examples=10, seed=0).failure is None


def even_only(subject, case, draw):
    if case % 2 == 0:
        subject.expect_close(torch.tensor([1.0]), torch.tensor([1.0]), 0.0, "it must be one", case)


def test_cases_on_which_nothing_is_compared_are_not_counted():
    found = search(even_only, THEOREM, st.integers(0, 1000), examples=20, seed=0)
    assert found.cases == 20 and found.skipped > 0 and found.failure is None
    none = search(even_only, THEOREM, st.just(1), examples=20, seed=0)
    assert none.cases == 0 and none.skipped > 0 and none.failure is None


def test_results_without_entries_and_the_form_of_an_output_are_no_comparison():
    trial = next(trial for trial in work.trials(Asked()) if trial.variant is not None)
    subject, empty, one = trial.subject, torch.zeros(0), torch.ones(1, 1)
    subject.expect_close(empty, empty, 1.0, "it must be close", None)
    subject.output(Case(one, one, one, 1))
    assert subject.record.made == 0
    subject.expect_close(one, one, 1.0, "it must be close", None)
    assert subject.record.made == 1


def test_a_statement_with_nothing_to_compare_is_not_said_to_hold(capsys, monkeypatch):
    def idle(subject, case, draw):
        even_only(subject, 1, draw)

    statement = dataclasses.replace(work.THEOREMS[0], law=idle)
    monkeypatch.setattr(work, "THEOREMS", (statement,))
    monkeypatch.setattr(work, "CHECKS", ())
    monkeypatch.setattr(work, "variants", lambda operator: [])
    assert verify("--examples", "3") == 0
    printed = capsys.readouterr().out
    assert check_table(printed) == {"holds": 0, "FAILS": 0, "coarse": 0, "not tried": 1}
    assert "0 of 1 statements tried in float64 on cpu hold, in 0 cases; for 1 there was nothing to compare" in printed


def test_a_tolerance_as_large_as_what_is_compared_is_too_coarse_to_tell():
    verdict = work.Verdict(work.THEOREMS[0], cases=3, shares=[0.1, 0.2, 5.0])
    assert verdict.holds and not verdict.coarse
    verdict.shares.append(6.0)
    assert verdict.coarse and not verdict.holds and not verdict.fails
    verdict.shares.clear()
    assert verdict.holds  # of yes or no there is no size


def test_the_seed_moves_the_cases():
    def cases(seed):
        found = []
        law = lambda subject, case, draw: subject.expect(found.append(case) is None, "it must be kept", case)  # noqa: E731
        search(law, THEOREM, st.integers(), examples=10, seed=seed)
        return found

    assert cases(0) == cases(0) != cases(1)


def test_errors_are_counted_in_units_of_the_tolerance():
    trial = work.trials(Asked())[0]
    subject = trial.subject
    subject.expect_close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 2.0, "it must be close", None)
    assert (subject.record.worst, subject.record.shares) == (0.25, [0.8])
    subject.expect_close(torch.zeros(2), torch.zeros(2), 2.0, "it must be close", None, size=4.0)
    assert (subject.record.worst, subject.record.shares) == (0.25, [0.8, 0.5])
    with pytest.raises(AssertionError):
        subject.expect_close(torch.tensor([torch.nan]), torch.tensor([1.0]), 2.0, "it must be close", None)
    assert subject.record.worst == float("inf")
    assert trial.subject.record.worst == 0.0  # nothing is shared


def test_values_are_written_as_python():
    strided = torch.arange(6.0).reshape(2, 3).mT
    case = Case(strided, torch.ones(1, 2), torch.tensor([[float("nan")]]), 1, 0.5, (torch.tensor([True]), None), True)
    known = {"torch": torch, "Case": Case, "nan": float("nan")}
    again = eval(literal(case), known)
    assert again.query.equal(strided) and again.query.stride() == (1, 3)
    assert again.weights[0].dtype == torch.bool and again.weights[1] is None
    assert (again.scale, again.order, again.on_grid) == (0.5, 1, True)
    assert again.value.isnan().all()
    odd = torch.empty_strided((1, 1, 2), (5, 9, 1)).fill_(3.0)  # contiguous, says torch
    assert eval(literal(odd), known).stride() == (5, 9, 1)
    assert eval(literal(dataclasses.replace(case, pooled=True)), known).pooled and not again.pooled
    for value in (1, (2,), (1, (3, 4)), [1.5, None], "text", torch.float32, {1, 2}):
        assert eval(literal(value), known) == value
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    assert eval(literal(generator), known).initial_seed() == 5


@pytest.mark.parametrize("order", [5, 6])
def test_means_that_cancel_may_err_each_on_its_own(order):
    """The most modes that the command takes: 49 means of six modes are added up with signs."""
    check_zero_scale_mean("truncated", order=order, examples=10)


# ---- nothing is forgotten ------------------------------------------------------------------------------------


def test_every_check_is_a_statement_with_a_formula():
    assert set(claims.CHECKS) >= {*CLAIMED.values(), *UNIVERSAL}
    for check in claims.CHECKS:
        statement = claims.statement_of(check)
        assert statement.words == check.statement and statement.formula
        assert statement.share == check.share and statement.double == ("dtype" in check.drawn)


def test_every_operator_is_tried_with_every_option():
    tried = variants()
    assert {name for name, _ in tried} == set(OPERATORS)
    for name, operator in OPERATORS.items():
        assert set(operator.options) == {option for known, options in tried if known == name for option in options}


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


def test_a_device_that_is_not_there_is_told_in_one_line(capsys):
    assert verify("--device", "nowhere") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"{PROGRAM}: --device 'nowhere' cannot be used: ") and printed.count("\n") == 1


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


def test_without_tqdm_there_are_lines(capsys, monkeypatch):
    def without_tqdm(module, **how):
        if module == "tqdm":
            raise MissingPackageError("not here")
        return require(module, **how)

    monkeypatch.setattr(progress, "require", without_tqdm)
    assert verify("--examples", "1", "--operator", "kronecker_product") == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(set(told)) > 5 and all(line.startswith("trying: ") for line in told)


def test_numbers_are_short():
    verdict = work.Verdict(claims.statement_of(CLAIMED[Claim.CONVEX]), cases=1, worst=0.0)
    for worst, text in ((0.0, "0"), (0.5, "0.500"), (1e-5, "1e-05"), (1234.0, "1e+03"), (float("inf"), "inf")):
        verdict.worst = worst
        assert text in report.table([verdict], torch.float64).splitlines()[2].split()
