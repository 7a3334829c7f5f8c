"""The tournament's judge, on a study whose gains are known."""

from __future__ import annotations

import polars as pl
import pytest
import tournament
from synthetic_study import write_study

from tutelage.study.results import load_results

SALT, GAP = "salt value 0.8 until 0.3", "gap_driven floor 0.1"
GAINS = {
    ("weak", 0.2): (0.5, 1.0),
    ("weak", 0.4): (-1.0, 3.0),
    ("weak", SALT): (0.2, 0.5),  # behind 0.2 on both sides
    ("weak", GAP): (1.0, 0.2),  # ahead of all in domain
    ("strong", 0.2): (1.0, 1.0),
    ("strong", 0.4): (2.0, 2.0),
    ("strong", SALT): (1.5, 2.5),  # 0.4 is ahead in domain only
    ("strong", GAP): (1.9, 1.9),
}


def test_an_arm_is_beaten_where_one_constant_has_more_on_both_sides(tmp_path):
    table = tournament.gains_of(load_results(write_study(tmp_path / "study", gains=GAINS)))
    rows = {(row["teacher"], row["arm"]): row for row in tournament.judged(table, constants=False).to_dicts()}
    assert {key: row["beaten by"] for key, row in rows.items()} == {
        ("weak", SALT): "alpha 0.2",
        ("weak", GAP): "-",
        ("strong", SALT): "-",
        ("strong", GAP): "alpha 0.4",
    }
    weak = rows["weak", SALT]
    assert weak["regret raw"] == pytest.approx(0.3, abs=0.02)
    assert weak["regret out"] == pytest.approx(2.5, abs=0.02)
    mean, half = map(float, weak["raw"].split(" ± "))
    assert (mean, half) == pytest.approx((0.2, 4.303 * 0.1 / 3**0.5), abs=0.02)  # t of 2 degrees of freedom


def test_constants_are_judged_by_the_others(tmp_path):
    table = tournament.gains_of(load_results(write_study(tmp_path / "study", gains=GAINS)))
    rows = tournament.judged(table, constants=True).filter(teacher="strong").to_dicts()
    found = {row["arm"]: row["beaten by"] for row in rows if row["arm"].startswith("alpha")}
    assert found == {"alpha 0.2": "alpha 0.4", "alpha 0.4": "-"}


def test_arms_are_summed_over_pairs(tmp_path):
    rows = tournament.judged(
        tournament.gains_of(load_results(write_study(tmp_path / "study", gains=GAINS))), constants=False
    )
    salt = tournament.summed(rows).filter(arm=SALT).to_dicts()[0]
    assert (salt["pairs"], salt["unbeaten in"]) == (2, 1)
    # best constants out of domain: 3.0 of the weak teacher, 2.0 of the strong
    assert salt["regret out"] == pytest.approx(((3.0 - 0.5) + (2.0 - 2.5)) / 2, abs=0.02)
    assert salt["worst out"] == pytest.approx(2.5, abs=0.02)
    assert tournament.markdown(rows).splitlines()[1].replace(" ", "") == "|---" * len(rows.columns) + "|"


def test_how_steady_a_verdict_is(tmp_path):
    table = tournament.gains_of(load_results(write_study(tmp_path / "study", gains=GAINS)))
    lucky = pl.when(arm=GAP, teacher="strong", seed=table["seed"][0]).then(0.9).otherwise(0.0)
    table = table.with_columns(pl.col("raw", "fitted") + lucky)  # ahead where that replicate is drawn

    def shares(some):
        return {arm: float(share.removesuffix("%")) for arm, share in tournament.steadiness(some).iter_rows()}

    drawn = pytest.approx(100 * (1 - (2 / 3) ** 3), abs=3)
    assert shares(table.filter(teacher="weak")) == {SALT: 0, GAP: 100}
    assert shares(table.filter(teacher="strong")) == {SALT: 100, GAP: drawn}
    assert shares(table) == {SALT: 0, GAP: drawn}  # one pair of two is not enough


def test_a_pair_without_constants_is_no_tournament(tmp_path):
    gains = {key: gain for key, gain in GAINS.items() if key[0] == "strong" or isinstance(key[1], str)}
    table = tournament.gains_of(load_results(write_study(tmp_path / "study", gains=gains)))
    assert table["teacher"].unique().to_list() == ["strong"]
    fewer = table.filter(~(pl.col("constant") & (pl.col("seed") == table["seed"][0])))
    assert tournament.steadiness(fewer).is_empty()  # no constant has all replicates
